"""An engine in miniature: jagged costs, requests that accept at given rates, and the real scheduler deciding.

Time is what the costs say, times noise. Run as a script for the table that the constants of `scheduler.cpp` and
`survival.cpp` are judged by.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from dspark_cpp import _core

BLOCK = 7
OVERHEAD_MS = 0.5
# From T(1) ms: what a pass of n rows costs, beyond the list by its last slope.
CURVES = {
    "flat": [20, 20.2, 20.4, 20.6, 20.8, 21, 21.2, 21.4],  # a GPU
    "linear": [26, 42, 63, 85, 107, 129, 151, 174],  # two cores, Q4_K
    "cliffs": [24, 46, 66, 74, 142, 142, 142, 142],  # two cores, Q4_0
}


@dataclass
class Setting:
    curve: str
    rate: float  # P(draft accepted | those before it were), on average
    n_requests: int = 1
    draft_share: float = 0.25  # T_draft(1) / T_verify(1)
    spread: float = 1.5  # of a round's difficulty in logits; the confidence sees half of its variance
    n_tokens: int = 0  # of an answer; 0: it has no end
    n_prompt: int = 0  # rows that wait for the first draft of an answer
    bias: float = 0.0  # added to the confidence logits: a calibration that does not fit


def row_ms(setting: Setting, n: int) -> float:
    known = CURVES[setting.curve]
    slope = (known[-1] - known[0]) / (len(known) - 1)
    return float(known[n - 1] if n <= len(known) else known[-1] + slope * (n - len(known)))


def draft_ms(setting: Setting, n: int) -> float:
    return 0.0 if n == 0 else setting.draft_share * CURVES[setting.curve][0] * (0.6 + 0.4 * n)


def inject_ms(setting: Setting, n_rows: int) -> float:
    """One row costs a tenth of a draft, every row a hundredth more."""
    return 0.0 if n_rows == 0 else draft_ms(setting, 1) * (0.1 + 0.01 * n_rows)


def curves(setting: Setting) -> dict[str, Any]:
    n = setting.n_requests
    return {
        "verify": [(rows, row_ms(setting, rows)) for rows in range(1, n * (1 + BLOCK) + 1)],
        "prefill": [(1, row_ms(setting, 1))],
        "draft": [(blocks, draft_ms(setting, blocks)) for blocks in range(1, n + 1)],
        "inject": [(rows, inject_ms(setting, rows)) for rows in (1, 2, 4, 8, 32, 128)] if setting.n_prompt else [],
        "verify_ms_per_row_cell": 0.0,
        "draft_ms_per_block_cell": 0.0,
    }


@dataclass
class Result:
    tokens_per_ms: float
    probe_share: float
    parked_share: float


class Simulation:
    """Steps of one setting; `rates` may change on the way."""

    def __init__(self, setting: Setting, policy: str = "adaptive", seed: int = 0, **options: Any) -> None:
        self.setting, self.rng = setting, np.random.default_rng(seed)
        self.rates = [setting.rate] * setting.n_requests
        self.scheduler = _core._scheduling.Scheduler(  # type: ignore[attr-defined]
            policy=policy, costs=curves(setting), block_size=BLOCK, **options
        )
        self.requests = [self.request(i + 1) for i in range(setting.n_requests)]
        self.n_tokens = [0] * setting.n_requests
        self.ms = self.probe_ms = 0.0
        self.n_parked = self.n_steps = 0
        self.plain_factor = 1.0  # what plain passes take beyond the costs
        self.decisions: list[str] = []
        self.accepted: list[int] = []  # of every round drawn, had all of its block been verified

    def request(self, request_id: int) -> dict[str, Any]:
        request = {"id": request_id, "rule": "block", "temperature": 1.0, "n_waiting": self.setting.n_prompt}
        return request | ({"n_left": self.setting.n_tokens} if self.setting.n_tokens else {})

    def advance(self, i: int, n_committed: int, *, drafted: bool) -> None:
        """Count tokens; an answer that ends makes room for the next one."""
        self.n_tokens[i] += n_committed
        request = self.requests[i]
        request["n_waiting"] = n_committed if drafted else request["n_waiting"] + n_committed
        if "n_left" in request:
            request["n_left"] -= n_committed
            request["most"] = max(0, min(BLOCK, request["n_left"] - 1))
            if request["n_left"] <= 0:
                self.scheduler.finish(request["id"], self.setting.n_tokens)
                self.requests[i] = self.request(max(r["id"] for r in self.requests) + 1)

    def round_of(self, i: int) -> tuple[list[float], int]:
        """Confidence logits and how many drafts stand when all are verified."""
        if self.rates[i] <= 0:
            return [-1.0 + self.setting.bias] * BLOCK, 0
        spread = self.setting.spread
        logit = np.log(self.rates[i] / (1 - self.rates[i])) * np.sqrt(1 + 0.35 * spread**2)
        hard = spread * self.rng.normal(size=2) * np.sqrt(0.5)  # seen, unseen
        stands = self.rng.random(BLOCK) < 1 / (1 + np.exp(-(logit + hard.sum())))
        shown = (logit + hard[0]) / np.sqrt(1 + 0.35 * spread**2 / 2)
        return [float(shown) + self.setting.bias] * BLOCK, BLOCK if stands.all() else int(np.argmin(stands))

    def step(self) -> None:
        decisions = self.decisions = self.scheduler.select(self.requests)
        rounds = [self.round_of(i) for i in range(len(self.requests))]
        self.accepted += [r[1] for r in rounds]
        drafts = [decision in ("draft", "probe", "timed") for decision in decisions]
        lengths = self.scheduler.schedule([r[0] if d else [] for r, d in zip(rounds, drafts, strict=True)])
        n_injected = sum(r["n_waiting"] for r, d in zip(self.requests, drafts, strict=True) if d)
        n_committed = 0
        for i, (length, drafted) in enumerate(zip(lengths, drafts, strict=True)):
            n_accepted = min(length, rounds[i][1])
            n_committed += 1 + n_accepted
            if drafted:
                self.scheduler.observe_round(i, length, n_accepted)
            self.advance(i, 1 + n_accepted, drafted=drafted)
        injecting = inject_ms(self.setting, n_injected) if self.setting.n_prompt else 0.0
        self.spend(drafts, lengths, n_committed, injecting)

    def spend(self, drafts: list[bool], lengths: list[int], n_committed: int, injecting: float) -> None:
        decisions = self.decisions
        n = len(self.requests)
        noise = 1 + 0.03 * abs(self.rng.normal())
        drafting = draft_ms(self.setting, sum(drafts))
        verifying = row_ms(self.setting, n + sum(lengths)) * (1.0 if any(drafts) else self.plain_factor)
        self.scheduler.observe_step(
            n_drafting=sum(drafts),
            n_drafted_rows=sum(lengths),
            n_committed=n_committed,
            draft_ms=drafting * noise,
            verify_ms=verifying * noise,
            inject_ms=injecting * noise,
            total_ms=(drafting + injecting + verifying) * noise + OVERHEAD_MS,
        )
        total = drafting + injecting + verifying + OVERHEAD_MS
        self.ms += total
        self.n_steps += 1
        self.n_parked += decisions.count("parked") / n
        if "probe" in decisions and "draft" not in decisions:
            self.probe_ms += total - row_ms(self.setting, n) - OVERHEAD_MS

    def run(self, n_steps: int) -> Result:
        ms, tokens, probe, parked = self.ms, sum(self.n_tokens), self.probe_ms, self.n_parked
        for _ in range(n_steps):
            self.step()
        return Result(
            (sum(self.n_tokens) - tokens) / (self.ms - ms),
            (self.probe_ms - probe) / (self.ms - ms),
            (self.n_parked - parked) / n_steps,
        )


def fixed_lengths(simulation: Simulation) -> list[float]:
    """Tokens per ms of every fixed length, 0 (plain) to BLOCK, in hindsight: on the rounds that the simulation drew."""
    setting, accepted = simulation.setting, np.array(simulation.accepted)
    n = setting.n_requests
    return [
        float(
            n
            * (1 + np.minimum(accepted, length).mean())
            / (row_ms(setting, n * (1 + length)) + (draft_ms(setting, n) if length else 0) + OVERHEAD_MS)
        )
        for length in range(BLOCK + 1)
    ]


def main() -> None:
    """Print the table."""
    print(f"{'curve':8} {'n':>2} {'draft':>5} {'rate':>5} | best fixed  to plain  to best  parked  probes")
    for curve in CURVES:
        for n_requests in (1, 4):
            for draft_share in (0.1, 0.5, 2.0):
                for rate in (0.0, 0.3, 0.6, 0.8, 0.95):
                    setting = Setting(curve, rate, n_requests, draft_share)
                    simulation = Simulation(setting)
                    result = simulation.run(1000)
                    fixed = fixed_lengths(simulation)
                    print(
                        f"{curve:8} {n_requests:2} {draft_share:5} {rate:5} | {int(np.argmax(fixed)):10}"
                        f"  {result.tokens_per_ms / fixed[0]:8.3f} {result.tokens_per_ms / max(fixed):8.3f}"
                        f"  {result.parked_share:6.2f}  {result.probe_share:6.4f}"
                    )


if __name__ == "__main__":
    main()
