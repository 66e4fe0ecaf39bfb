"""`dspark demo`: plain decoding and DSpark side by side on the bundled pair, told honestly.

Owns: what is run and timed, and how it is shown. Must not know: anything that `LLM` does not offer to everybody.

Plain decoding is an LLM without a drafter, so that it carries none of speculation's costs. Both stay open and take
turns answer by answer, so that a machine that slows down slows both. The figures are medians over answers. Speed is in
tokens per second of the engine's own time in rounds: loading, prefill and the printing here are in neither.
"""

from __future__ import annotations

import codecs
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dspark_cpp.config import DemoConfig, SamplingParams
from dspark_cpp.llm import LLM
from dspark_cpp.results import Completion, RequestStats

__all__ = ["run_demo"]

_FOLDER = Path(__file__).parent / "demo"
_BUDGET_SECONDS = 50.0  # no repetition but the first begins after this: a slow machine gets fewer, not a longer wait
_N_CTX = 1024
_ACCEPTED_STYLE = "bold green"
_MISMATCH = (
    "With dspark-cpp's CPU kernels this means a bug. Elsewhere (`dspark info` tells) a batch of several tokens rounds "
    "differently from one token alone, which can flip nearly equal logits; more than the odd case means a bug too.\n"
)
_PAYS = 1.02  # below this a difference is noise, above it a gain worth the word


@dataclass(slots=True)
class _Domain:
    """One domain's prompts, and the figures of each answer by either way of decoding."""

    name: str
    prompts: list[str]
    plain: list[RequestStats] = field(default_factory=list)
    dspark: list[RequestStats] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Speed of DSpark over that of plain decoding: median over pairs of answers that ran one after the other."""
        pairs = zip(self.plain, self.dspark, strict=True)
        return median(spark.tokens_per_second / max(plain.tokens_per_second, 1e-9) for plain, spark in pairs)

    @property
    def accepted_length(self) -> float:
        """Tokens per round of DSpark."""
        n_rounds = sum(stats.n_rounds for stats in self.dspark)
        return sum(stats.n_committed for stats in self.dspark) / max(n_rounds, 1)


def _open_plain() -> LLM:
    return LLM(_FOLDER / "target.gguf", n_ctx=_N_CTX, prefix_reuse=False)  # repeated prompts must not become free


def _open_dspark() -> LLM:
    return LLM.demo(n_ctx=_N_CTX, prefix_reuse=False)


def _ask(llm: LLM, prompt: str, params: SamplingParams) -> Completion:
    """Answer one prompt through the model's chat template."""
    return llm.chat([{"role": "user", "content": prompt}], params)


class _Demo:
    """The terminal and the clock."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._began = time.perf_counter()

    def compare(self, llm: LLM, domains: Sequence[_Domain], params: SamplingParams) -> None:
        """Print an answer of each domain with its accepted tokens marked; compare all with speculation off.

        Off and on run in the same engine and cache.
        """
        legend = Text("Accepted draft tokens look ").append(*self._mark("like this"))
        self._console.print(legend.append("; the others are the target's own.\n"))
        wrong: list[str] = []
        for domain in domains:
            for prompt in domain.prompts:
                off = _ask(llm, prompt, replace(params, draft="off"))
                on = _ask(llm, prompt, params)
                wrong += _difference(prompt, off.token_ids, on.token_ids)
                if prompt == domain.prompts[0]:
                    self._show(llm, domain, on)
        self._report(sum(len(domain.prompts) for domain in domains), wrong)

    def _show(self, llm: LLM, domain: _Domain, answer: Completion) -> None:
        self._console.print(Text(f"{domain.name}: {domain.prompts[0]}", style="bold"), soft_wrap=True)
        self._console.print(self._marked(llm, answer), soft_wrap=True)
        self._console.print()

    def _report(self, n_prompts: int, wrong: Sequence[str]) -> None:
        text = f"Greedy text with speculation off and on: {n_prompts - len(wrong)} of {n_prompts} identical.\n"
        self._console.print(text, style="bold red" if wrong else "green")
        for line in wrong:
            self._console.print(line, soft_wrap=True)
        if wrong:
            self._console.print(_MISMATCH, soft_wrap=True)

    def measure(self, domains: Sequence[_Domain], params: SamplingParams, n_repeats: int, until_s: float) -> None:
        """Time both ways of decoding in turns, `n_repeats` times or as often as the time is enough for."""
        with _open_plain() as plain, _open_dspark() as dspark:
            for llm in (plain, dspark):
                _ask(llm, domains[0].prompts[0], replace(params, max_tokens=16))  # warms it up
            for repeat in range(n_repeats):
                if repeat > 0 and time.perf_counter() - self._began > until_s:
                    return
                for domain in domains:
                    ways = [(plain, domain.plain), (dspark, domain.dspark)]
                    ordered = ways if repeat % 2 == 0 else ways[::-1]
                    _answer_in_turns(ordered, domain.prompts, replace(params, seed=repeat))

    def _marked(self, llm: LLM, answer: Completion) -> Text:
        """Return the text of an answer, accepted tokens marked; half a character waits for its other half."""
        text, decoder = Text(), codecs.getincrementaldecoder("utf-8")("replace")
        run, is_run_drafted = "", False
        for token, is_drafted in zip(answer.token_ids, answer.drafted, strict=True):
            if is_drafted != is_run_drafted:
                text.append(*self._mark(run) if is_run_drafted else (run,))
                run, is_run_drafted = "", is_drafted
            run += decoder.decode(llm.model.token_to_piece(token))
        return text.append(*self._mark(run) if is_run_drafted else (run,))

    def _mark(self, text: str) -> tuple[str, str]:
        """Show `text` as accepted: in colour, or between brackets where there is none."""
        has_color = self._console.color_system is not None and not self._console.no_color
        left, right = "[]" if self._console.options.ascii_only else "‹›"
        return (text if has_color or not text else f"{left}{text}{right}", _ACCEPTED_STYLE)


def run_demo(config: DemoConfig, console: Console | None = None) -> None:
    """Run the demo and print it.

    Parameters
    ----------
    config : DemoConfig
        How often, and how long.
    console : Console, optional
        Where to print.
    """
    console = console or Console(highlight=False)
    greedy = SamplingParams(temperature=0.0, max_tokens=config.max_tokens)
    demo = _Demo(console)
    at_zero, at_one = _read_domains(), _read_domains()
    with _open_dspark() as llm:
        demo.compare(llm, at_zero, greedy)
    demo.measure(at_zero, greedy, config.n_repeats, _BUDGET_SECONDS / 2)
    console.print(_table("Temperature 0", at_zero))
    demo.measure(at_one, replace(greedy, temperature=1.0), config.n_repeats, _BUDGET_SECONDS)
    console.print(_table("Temperature 1", at_one))
    console.print(_verdict(at_zero), style="bold", soft_wrap=True)


def _answer_in_turns(
    ways: Sequence[tuple[LLM, list[RequestStats]]], prompts: Sequence[str], params: SamplingParams
) -> None:
    """Answer each prompt by every way, one right after the other: what slows the machine then slows them all."""
    for prompt in prompts:
        for llm, stats in ways:
            stats.append(_ask(llm, prompt, params).stats)


def _difference(prompt: str, off: list[int], on: list[int]) -> list[str]:
    """Say where two answers part, if they do."""
    if off == on:
        return []
    pairs = enumerate(zip(off, on, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(off), len(on)))
    return [f"  differs from token {at} of {len(off)}: {prompt}"]


def _read_domains() -> list[_Domain]:
    prompts = json.loads((_FOLDER / "prompts.json").read_text(encoding="utf-8"))
    return [_Domain(name, list(texts)) for name, texts in prompts.items()]


def _table(title: str, domains: Sequence[_Domain]) -> Table:
    n_runs = len(domains[0].plain) // len(domains[0].prompts)
    runs = "1 run" if n_runs == 1 else f"{n_runs} runs"
    title += f" (medians, {runs} of each prompt; milliseconds per DSpark round)"
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE)
    table.add_column("domain")
    for heading in _HEADINGS:
        table.add_column(heading, justify="right")
    for domain in [*domains, _total(domains)]:
        table.add_row(
            domain.name,
            f"{median(stats.tokens_per_second for stats in domain.plain):.0f}",
            f"{median(stats.tokens_per_second for stats in domain.dspark):.0f}",
            f"{domain.ratio:.2f}x",
            f"{domain.accepted_length:.2f}",
            *(f"{_per_round(domain.dspark, part):.2f}" for part in _PARTS),
        )
    return table


_HEADINGS = ("plain\ntokens/s", "DSpark\ntokens/s", "ratio", "accepted\nlength", "draft\nms", "verify\nms", "host\nms")
_PARTS = ("draft_ms", "verify_ms", "host_ms")


def _per_round(answers: Sequence[RequestStats], part: str) -> float:
    """Milliseconds of one part of a round."""
    return median(float(getattr(stats, part)) / max(stats.n_rounds, 1) for stats in answers)


def _total(domains: Sequence[_Domain]) -> _Domain:
    """All domains as one."""
    plain = [stats for domain in domains for stats in domain.plain]
    dspark = [stats for domain in domains for stats in domain.dspark]
    return _Domain("all", [], plain, dspark)


def _verdict(domains: Sequence[_Domain]) -> str:
    """Say whether speculation pays here, and why."""
    total = _total(domains)
    plain_ms, round_ms = (max(_per_round(answers, "decode_ms"), 1e-9) for answers in (total.plain, total.dspark))
    cost = f"{round_ms / plain_ms:.1f} plain steps ({round_ms:.2f} ms against {plain_ms:.2f} ms)"
    why = f"a round costs {cost} and yields {total.accepted_length:.1f} tokens"
    if total.ratio >= _PAYS:
        return f"On this machine speculation is {total.ratio:.2f}x of plain decoding at temperature 0: {why}."
    advice = 'With this pair and this machine, policy="off" is the faster choice.'
    return f"On this machine speculation does not pay: {total.ratio:.2f}x of plain decoding, since {why}. {advice}"


if __name__ == "__main__":
    run_demo(DemoConfig())
