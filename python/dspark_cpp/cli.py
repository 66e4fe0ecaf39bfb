"""The `dspark` command: arguments to options, one call, its result on the terminal.

Owns: what the commands are called and take, how text and errors look on a terminal. Must not know: how it is done.
Heavy imports wait until a command needs them, so that `dspark --help` answers at once. Main thread only.
"""

from __future__ import annotations

import contextlib
import io
import sys
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dspark_cpp.config import DemoConfig, EngineConfig, SamplingParams
from dspark_cpp.errors import DSparkError
from dspark_cpp.server import cli as server_cli
from dspark_cpp.store_cli import register

if TYPE_CHECKING:
    from dspark_cpp._core import BuildInfo
    from dspark_cpp.chat import Message
    from dspark_cpp.llm import LLM
    from dspark_cpp.results import Chunk, RequestStats

__all__ = ["app", "main"]

app = typer.Typer(
    name="dspark",
    help="Language models in GGUF files, sped up by DSpark without a change to their output.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_SAMPLING = SamplingParams()
_ENGINE = EngineConfig()
_DEMO = DemoConfig()

_CHAT_HELP = "/clear forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer."


_FORWARDED: dict[str, Any] = {  # commands with a parser of their own, imported when they are called
    "add_help_option": False,
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
}


def main() -> None:
    """Run the command line: exit status 0, 1 after `error: ...`, 2 for wrong usage."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character is no reason to stop
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except (DSparkError, ValueError, OSError, ImportError) as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        sys.exit(1)


@app.command()
def run(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Model of the store, GGUF file, or `demo` for the bundled pair.")],
    prompt: Annotated[str | None, typer.Argument(help="One question; without it, a chat (or standard input).")] = None,
    draft: Annotated[str | None, typer.Option("--draft", "-d", help="GGUF file of the drafter.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is: no chat template.")] = False,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", "-n", help="Default: up to the context.")] = None,
    temperature: Annotated[float, typer.Option("--temperature", "-t", help="0: likeliest.")] = _SAMPLING.temperature,
    top_k: Annotated[int, typer.Option(help="0: all.")] = _SAMPLING.top_k,
    top_p: Annotated[float, typer.Option(help="1: all.")] = _SAMPLING.top_p,
    min_p: Annotated[float, typer.Option(help="0: all.")] = _SAMPLING.min_p,
    repetition_penalty: Annotated[float, typer.Option(help="1: off.")] = _SAMPLING.repetition_penalty,
    seed: Annotated[int | None, typer.Option(help="Same seed, same text.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")] = None,
    verification: Annotated[str, typer.Option(help="auto, exact, rejection, block.")] = _SAMPLING.verification,
    policy: Annotated[str, typer.Option(help="adaptive, off, full, fixed:n, threshold:p, ...")] = str(_ENGINE.policy),
    head: Annotated[str, typer.Option(help="candidates, full, graph.")] = _ENGINE.head,
    n_ctx: Annotated[int, typer.Option(help="Tokens of prompt and answer; 0: the model's.")] = _ENGINE.n_ctx,
    n_threads: Annotated[int, typer.Option(help="0: the engine's choice.")] = _ENGINE.n_threads,
    n_gpu_layers: Annotated[int, typer.Option(help="-1: all.")] = _ENGINE.n_gpu_layers,
    thinking: Annotated[bool, typer.Option(help="For templates that know it.")] = True,
    stats: Annotated[bool, typer.Option("--stats", help="Show the figures of speculation.")] = False,
) -> None:
    """Answer one question, or chat in the terminal."""
    from dspark_cpp.store_run import resolve

    engine: dict[str, Any] = {
        "policy": int(policy) if policy.isdecimal() else policy,
        "head": head,
        "n_ctx": n_ctx,
        "n_threads": n_threads,
        "n_gpu_layers": n_gpu_layers,
    }
    sampling: dict[str, Any] = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop": stop or (),
        "verification": verification,
    }
    SamplingParams(max_tokens=max_tokens or 1, **sampling)  # a bad option is told before a model is loaded
    found = resolve(model, draft, {name for name in context.params if _is_given(context, name)})
    sampling.update(found.sampling)
    engine.update(found.engine)
    max_tokens = found.max_tokens if max_tokens is None else max_tokens
    opening = found.opening if system is None else ({"role": "system", "content": system},)
    with _open_model(found.target, found.draft, engine) as llm:
        params = SamplingParams(max_tokens=llm.n_ctx if max_tokens is None else max_tokens, **sampling)
        session = _Session(llm, params, opening=opening, raw=raw, thinking=thinking, shows_stats=stats)
        if prompt is None and not sys.stdin.isatty():
            prompt = sys.stdin.read()
        if prompt is None:
            session.chat()
        else:
            session.answer(prompt)


@app.command()
def info(
    target: Annotated[Path | None, typer.Argument(help="GGUF file of a target: what it takes of memory.")] = None,
    draft: Annotated[Path | None, typer.Option("--draft", "-d", help="GGUF file of its drafter.")] = None,
) -> None:
    """Show what this build is and what it runs on, or what a target and its drafter take of memory."""
    from dspark_cpp._core import build_info, kernel_instruction_set, kernel_types

    if target is not None:
        from dspark_cpp.info import describe_memory

        for name, value in describe_memory(target, draft).items():
            typer.echo(f"{name:<15} {value}")
        return
    if draft is not None:
        raise typer.BadParameter("--draft needs a target before it")

    build = build_info()
    rows = [
        ("dspark-cpp", build.version),
        ("llama.cpp", build.llama_cpp_commit),
        ("backends", ", ".join(build.backends)),
        ("features", build.system_info),
        ("kernels", f"{kernel_instruction_set()}: {', '.join(kernel_types()) or 'none'}; other types: ggml"),
        *(("device", _describe_device(device)) for device in build.devices),
    ]
    for name, value in rows:
        typer.echo(f"{name:<11} {value}")
    _warn_of_missing_backends(build)


@app.command()
def demo(
    n_repeats: Annotated[int, typer.Option(help="Timed runs of each prompt; medians are shown.")] = _DEMO.n_repeats,
    max_tokens: Annotated[int, typer.Option(help="Most tokens per answer.")] = _DEMO.max_tokens,
) -> None:
    """Run plain decoding and DSpark side by side on the bundled pair."""
    from dspark_cpp.demo_run import run_demo

    run_demo(DemoConfig(n_repeats=n_repeats, max_tokens=max_tokens))


@app.command(**_FORWARDED)
def inspect(context: typer.Context) -> None:
    """Show what a target or drafter GGUF is, and whether two fit together."""
    from dspark_cpp.convert.cli import inspect_command

    _forward(inspect_command, context.args, "dspark inspect")


@app.command(**_FORWARDED)
def bench(context: typer.Context) -> None:
    """Measure plain decoding, every draft length and every policy in turns."""
    from dspark_cpp.bench.cli import bench_command

    _forward(bench_command, context.args, "dspark bench")


@app.command(**_FORWARDED)
def calibrate(context: typer.Context) -> None:
    """Fit a drafter's confidence to a target, and measure it on held-out prompts."""
    from dspark_cpp.calibrate_cli import calibrate_command

    _forward(calibrate_command, context.args, "dspark calibrate")


@app.command(**_FORWARDED)
def profile(context: typer.Context) -> None:
    """Show what a pass costs on this machine, where the cost jumps, and which draft length pays."""
    from dspark_cpp.bench.profile_cli import profile_command

    _forward(profile_command, context.args, "dspark profile")


def _forward(function: Callable[..., None], arguments: list[str], name: str) -> None:
    command = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    command.command()(function)
    command(arguments, prog_name=name)


def _open_model(model: str, draft: str | None, engine: dict[str, Any]) -> LLM:
    from dspark_cpp.llm import LLM

    EngineConfig(**engine)
    if model == "demo" and draft is None:
        return LLM.demo(**engine)
    return LLM(model, draft, **engine)


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


class _Session:
    """One terminal's conversation with a model."""

    def __init__(
        self,
        llm: LLM,
        params: SamplingParams,
        *,
        opening: Sequence[Message],
        raw: bool,
        thinking: bool,
        shows_stats: bool,
    ) -> None:
        self._llm = llm
        self._params = params
        self._first = opening
        self._messages = list(opening)
        self._raw = raw
        self._thinking = thinking
        self._shows_stats = shows_stats

    def chat(self) -> None:
        """Read questions and answer them until the user leaves."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives input() its line editing)
        typer.echo(_CHAT_HELP, err=True)
        while (line := _read_line()) is not None and line.strip() != "/exit":
            if line.strip() == "/clear":
                self._messages = list(self._first)
            elif line.strip():
                self._try_answer(line)

    def _try_answer(self, question: str) -> None:
        n_before = len(self._messages)
        try:
            self.answer(question, can_stop=True)
        except (DSparkError, ValueError) as error:
            del self._messages[n_before:]
            typer.echo(f"error: {error}", err=True)

    def answer(self, question: str, *, can_stop: bool = False) -> None:
        """Stream one answer; with `can_stop`, Ctrl-C ends the answer and not the program."""
        began = time.perf_counter()
        text, stats = "", None
        try:
            for chunk in self._start(question):
                text += chunk.text
                stats = chunk.stats
                _write(chunk.text)
        except KeyboardInterrupt:
            if not can_stop:
                raise
        _write("\n")
        self._messages.append({"role": "assistant", "content": text})
        if self._shows_stats and stats is not None:
            typer.echo(_describe_stats(stats, time.perf_counter() - began), err=True)

    def _start(self, question: str) -> Generator[Chunk]:
        self._messages.append({"role": "user", "content": question})
        if self._raw:
            return self._llm.stream(question, self._params)
        return self._llm.chat(self._messages, self._params, stream=True, enable_thinking=self._thinking)


def _read_line() -> str | None:
    """One line from the user; None at the end of input."""
    while True:
        try:
            return input(">>> ")
        except EOFError:
            typer.echo()
            return None
        except KeyboardInterrupt:
            typer.echo(f"\n{_CHAT_HELP}", err=True)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _describe_stats(stats: RequestStats, seconds: float) -> str:
    n_rounds = max(stats.n_rounds, 1)
    share = stats.n_accepted / stats.n_scheduled if stats.n_scheduled else 0.0
    return (
        f"[prompt {stats.n_prompt} tokens in {stats.prefill_ms:.0f} ms; {stats.n_committed} tokens at "
        f"{stats.tokens_per_second:.1f}/s, {seconds:.2f} s in all]\n"
        f"[{stats.n_rounds} rounds of {stats.accepted_length:.2f} tokens; drafted {stats.n_drafted}, verified "
        f"{stats.n_scheduled}, accepted {stats.n_accepted} ({share:.0%}); per round: draft "
        f"{stats.draft_ms / n_rounds:.2f}, verify {stats.verify_ms / n_rounds:.2f}, host "
        f"{stats.host_ms / n_rounds:.2f} ms]"
    )


def _describe_device(device: Any) -> str:
    free, total = device.memory_free_bytes / 2**30, device.memory_total_bytes / 2**30
    return f"{device.name} ({device.kind}): {device.description}, {free:.1f} of {total:.1f} GiB free"


def _warn_of_missing_backends(build: BuildInfo) -> None:
    present = {name.casefold() for name in build.backends}
    missing = [name for name in build.requested_backends if name.casefold() not in present]
    if missing:
        bar = "!" * 78
        text = f"WARNING: asked for when this was built, but not in it: {', '.join(missing)}"
        typer.secho(f"{bar}\n{text}\n{bar}", err=True, fg=typer.colors.RED, bold=True)


server_cli.register(app)
register(app)

if __name__ == "__main__":
    main()
