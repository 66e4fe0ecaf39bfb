"""What a caller may ask for: the options of a request and of an engine, and the only home of their defaults.

Checked when they are made, so that a bad value is named where it was written, not somewhere inside a step. Plain data:
knows no engine, no text, no thread.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict, get_args

from dspark_cpp.calibration import Calibration
from dspark_cpp.option_checks import (
    FLOAT_MAX,
    INT_MAX,
    check_bool,
    check_choice,
    checked_biases,
    checked_count,
    checked_integer,
    checked_number,
    checked_policy,
    checked_stops,
    store,
)

__all__ = [
    "CalibrateConfig",
    "CostSource",
    "CpuKernels",
    "DemoConfig",
    "DraftChoice",
    "EngineConfig",
    "EngineOptions",
    "Head",
    "KVType",
    "Objective",
    "Policy",
    "SamplingParams",
    "Verification",
    "checked_text",
    "default_candidates",
    "params_per_prompt",
]

Verification = Literal["auto", "exact", "rejection", "block"]
Head = Literal["candidates", "full", "graph"]
KVType = Literal["f16", "f32", "bf16", "q8_0", "q4_0"]
CpuKernels = Literal["auto", "ggml"]
DraftChoice = Literal["auto", "off"] | int
Policy = str | int
Objective = Literal["throughput", "latency"]
CostSource = Literal["auto", "measure", "none"]

_SEED_MAX = 2**64 - 1
_LOGPROBS_MAX = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one request is sampled, when it ends, and how it may be sped up.

    Parameters
    ----------
    max_tokens : int
        Most tokens to generate, at least 1.
    temperature : float
        0 takes the likeliest token. The default 1 is the model's own distribution: nothing is sharpened or cut off
        unless the caller says so.
    top_k : int
        Keep the `top_k` likeliest tokens; 0 keeps all.
    top_p : float
        Keep the smallest set of likeliest tokens with at least this probability, in (0, 1]; 1 keeps all.
    min_p : float
        Drop tokens below `min_p` times the largest probability, in [0, 1].
    repetition_penalty : float
        Above 0. Logits of tokens of prompt and output are divided (positive) or multiplied (negative) by it; 1 is off.
    presence_penalty, frequency_penalty : float
        In [-2, 2]. Taken off the logits of tokens of the output, once or times their count.
    penalty_window : int
        How many of the newest tokens these three penalties look at; -1 is all of prompt and output, 0 none.
    logit_bias : mapping of int to float, optional
        Token id to what is added to its logit.
    seed : int, optional
        In [0, 2**64). Same seed, same text (see `verification`). None draws a fresh one for each request.
    stop : str or sequence of str
        The text ends before the first of these that appears in it.
    ignore_eos : bool
        Go on after an end-of-text token.
    context_shift : bool
        When the context is full, forget the older half of what stands behind the first `n_keep` tokens and go on, in
        place of ending with "context_full". Refused where `LLM.can_shift` is false. What the model says afterwards is
        not quite what it would say to the shortened text alone: later tokens have seen the forgotten ones.
    n_keep : int
        Leading tokens of the prompt that a context shift keeps; -1 is the whole prompt.
    logprobs : int, optional
        None: none. 0: the log-probability of every token chosen. n: those of the n likeliest tokens too.
    verification : {"auto", "exact", "rejection", "block"}
        How drafted tokens are checked; each leaves the distribution of the text as it is. "auto" is "block", which
        accepts most, but "exact" at temperature 0 and for a request with a seed: under the other two the text, not its
        distribution, depends on how much was drafted, and so on the machine's speed.
    policy : str or int, optional
        How many drafted tokens a round are verified for this request; see `EngineConfig`. None is the engine's policy.
    draft : {"auto", "off"} or int
        Most drafted tokens a round for this request, whatever the policy says. "auto" sets no limit; 0 is "off".

    Raises
    ------
    TypeError
        A value of the wrong type, or an unknown option.
    ValueError
        A value out of its range: `<name> must <rule>, got <value>`.
    """

    max_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_window: int = -1
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    stop: str | Sequence[str] = ()
    ignore_eos: bool = False
    context_shift: bool = False
    n_keep: int = 0
    logprobs: int | None = None
    verification: Verification = "auto"
    policy: Policy | None = None
    draft: DraftChoice = "auto"

    def __post_init__(self) -> None:
        self._check_lengths()
        self._check_distribution()
        store(self, "logit_bias", checked_biases(self.logit_bias))
        store(self, "stop", checked_stops(self.stop))
        check_bool("ignore_eos", self.ignore_eos)
        check_bool("context_shift", self.context_shift)
        store(self, "n_keep", checked_integer("n_keep", self.n_keep, -1, INT_MAX))
        check_choice("verification", self.verification, get_args(Verification))
        if self.policy is not None:
            store(self, "policy", checked_policy(self.policy))
        store(self, "draft", checked_count("draft", self.draft, ("auto", "off")))

    def _check_lengths(self) -> None:
        store(self, "max_tokens", checked_integer("max_tokens", self.max_tokens, 1, INT_MAX))
        if self.seed is not None:
            store(self, "seed", checked_integer("seed", self.seed, 0, _SEED_MAX))
        if self.logprobs is not None:
            store(self, "logprobs", checked_integer("logprobs", self.logprobs, 0, _LOGPROBS_MAX))

    def _check_distribution(self) -> None:
        store(self, "temperature", checked_number("temperature", self.temperature, 0.0, FLOAT_MAX))
        store(self, "top_k", checked_integer("top_k", self.top_k, 0, INT_MAX))
        store(self, "top_p", checked_number("top_p", self.top_p, 0.0, 1.0, above=True))
        store(self, "min_p", checked_number("min_p", self.min_p, 0.0, 1.0))
        repetition = checked_number("repetition_penalty", self.repetition_penalty, 0.0, FLOAT_MAX, above=True)
        store(self, "repetition_penalty", repetition)
        store(self, "presence_penalty", checked_number("presence_penalty", self.presence_penalty, -2.0, 2.0))
        store(self, "frequency_penalty", checked_number("frequency_penalty", self.frequency_penalty, -2.0, 2.0))
        store(self, "penalty_window", checked_integer("penalty_window", self.penalty_window, -1, INT_MAX))

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple, whatever it was given as."""
        return tuple(self.stop)

    @property
    def rule(self) -> Verification:
        """`verification` with "auto" resolved."""
        if self.verification != "auto":
            return self.verification
        return "exact" if self.temperature == 0 or self.seed is not None else "block"

    @property
    def draft_limit(self) -> int:
        """`draft` as the engine takes it: -1 for its own policy, else the most drafted tokens a round."""
        return {"auto": -1, "off": 0}[self.draft] if isinstance(self.draft, str) else self.draft


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How a pair of models is loaded and run.

    Parameters
    ----------
    n_ctx : int
        Most tokens of one request, prompt and output together; 0 is what the model was trained with, at most 4096.
    n_parallel : int
        Requests that run at the same time; the cache grows with it.
    n_gpu_layers : int
        Layers kept on the GPU; -1 is all of them.
    n_threads, n_threads_batch : int
        Most threads for decoding and for prefill; 0 leaves their number to the engine. Passes so short that one thread
        is faster run with one.
    n_batch : int
        Most rows of one forward pass of the target.
    kv_type : {"f16", "f32", "bf16", "q8_0", "q4_0"}
        Type of the target's cache. The drafter's is never quantized: that ruins acceptance.
    head : {"candidates", "full", "graph"}
        Form of the sequential head: over the `n_candidates` likeliest tokens of a slot, over the whole vocabulary
        (the reference), or as a graph on the drafter's device.
    n_candidates : int, optional
        Candidates per slot. None: 64 for `candidates` with a vanilla Markov head, which adds the 16 tokens that the
        head lifts most after the token before; else 256.
    policy : str or int
        How many drafted tokens a round are verified. "adaptive": what pays, from measured costs and calibrated
        confidence, for every request and step, and no draft at all where none pays. "off". "fixed:n" or n; "full" is
        the whole block. "threshold:p": up to the first token whose raw confidence is below p. "algorithm1": the
        paper's. Each leaves the distribution of the text as it is.
    objective : {"throughput", "latency"}
        What "adaptive" maximises: tokens per second of the whole engine, or each request's own speed.
    costs : {"auto", "measure", "none"}
        Where "adaptive" and "algorithm1" learn what a pass costs on this machine: from the cache of measured costs, or
        at load in at most 3 seconds; always at load; only while running.
    calibration : path or Calibration, optional
        What `dspark calibrate` fitted. None: the file beside the drafter, else what the drafter's own file holds.
    draft_window : int
        Newest tokens the drafter can see. Drafters are trained at 4096, and fall apart far beyond it.
    max_queue : int
        Requests that may wait; one more is refused with QueueFullError.
    prefill_chunk : int
        Most rows of prompts in one forward pass while any request decodes: a smaller one keeps the others' pauses
        short, a larger one lets long prompts begin sooner. While nobody decodes prompts get all of `n_batch`.
    prefix_reuse : bool
        Keep what finished requests left in the caches, for later prompts that begin alike: a chat's next turn, a
        shared system prompt. With a sliding window or a recurrent state only for a prompt that goes on where the
        earlier request ended.
    flash_attention : bool, optional
        Use llama.cpp's fused attention. None: with a GPU only. On a CPU it rounds to f16 inside, so that a token's
        logits depend a little on what shares its batch.
    use_mmap : bool
        Map the files instead of reading them.
    check_tensors : bool
        Look for invalid numbers in the files while loading.
    cpu_kernels : {"auto", "ggml"}
        Matrix products on the CPU: "auto" takes our kernels for the weight types that they multiply faster on this
        processor (`dspark info` lists them), "ggml" llama.cpp's own, with repacked weights.

    Raises
    ------
    TypeError
        A value of the wrong type, or an unknown option.
    ValueError
        A value out of its range: `<name> must <rule>, got <value>`.
    """

    n_ctx: int = 0
    n_parallel: int = 1
    n_gpu_layers: int = -1
    n_threads: int = 0
    n_threads_batch: int = 0
    n_batch: int = 512
    kv_type: KVType = "f16"
    head: Head = "candidates"
    n_candidates: int | None = None
    policy: Policy = "adaptive"
    objective: Objective = "throughput"
    costs: CostSource = "auto"
    calibration: str | os.PathLike[str] | Calibration | None = None
    draft_window: int = 4096
    max_queue: int = 512
    prefill_chunk: int = 64
    prefix_reuse: bool = True
    flash_attention: bool | None = None
    use_mmap: bool = True
    check_tensors: bool = False
    cpu_kernels: CpuKernels = "auto"

    def __post_init__(self) -> None:
        for name, (low, high) in _ENGINE_RANGES.items():
            store(self, name, checked_integer(name, getattr(self, name), low, high))
        if self.n_candidates is not None:
            store(self, "n_candidates", checked_integer("n_candidates", self.n_candidates, 1, INT_MAX))
        for name in ("use_mmap", "check_tensors", "prefix_reuse"):
            check_bool(name, getattr(self, name))
        if self.flash_attention is not None:
            check_bool("flash_attention", self.flash_attention)
        check_choice("kv_type", self.kv_type, get_args(KVType))
        check_choice("head", self.head, get_args(Head))
        check_choice("cpu_kernels", self.cpu_kernels, get_args(CpuKernels))
        check_choice("objective", self.objective, get_args(Objective))
        check_choice("costs", self.costs, get_args(CostSource))
        store(self, "policy", checked_policy(self.policy))
        if not isinstance(self.calibration, str | os.PathLike | Calibration | None):
            raise TypeError(f"calibration must be a path or a Calibration, got {self.calibration!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoConfig:
    """How long the demo takes.

    Parameters
    ----------
    n_repeats : int
        Timed runs of each prompt, at least 1; a slow machine makes fewer.
    max_tokens : int
        Most tokens per answer, at least 2.
    """

    n_repeats: int = 10
    max_tokens: int = 128

    def __post_init__(self) -> None:
        store(self, "n_repeats", checked_integer("n_repeats", self.n_repeats, 1, INT_MAX))
        store(self, "max_tokens", checked_integer("max_tokens", self.max_tokens, 2, INT_MAX))


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrateConfig:
    """What a calibration measures, and for how long.

    Parameters
    ----------
    rules : tuple of {"exact", "rejection", "block"}
        Verification rules to calibrate at temperatures above 0. At 0 all accept the same tokens: "exact" stands for
        them.
    temperatures : tuple of float
        Sampling temperatures.
    n_tokens : int
        Tokens to generate for each rule and temperature, half of them for the fit; fewer where the prompts run out
        (at temperature 0 every prompt is answered once).
    max_tokens : int
        Most tokens per answer.
    seed : int
        Of the split of the prompts, and of the answers.
    """

    rules: tuple[str, ...] = ("exact", "rejection", "block")
    temperatures: tuple[float, ...] = (0.0, 0.7, 1.0)
    n_tokens: int = 8_000
    max_tokens: int = 192
    seed: int = 0

    def __post_init__(self) -> None:
        for rule in self.rules:
            check_choice("rules", rule, ("exact", "rejection", "block"))
        temperatures = tuple(checked_number("temperatures", one, 0.0, FLOAT_MAX) for one in self.temperatures)
        for name, values in (("rules", self.rules), ("temperatures", temperatures)):
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must hold different values, at least one, got {list(values)}")
        store(self, "temperatures", temperatures)
        store(self, "n_tokens", checked_integer("n_tokens", self.n_tokens, 1, INT_MAX))
        store(self, "max_tokens", checked_integer("max_tokens", self.max_tokens, 2, INT_MAX))
        store(self, "seed", checked_integer("seed", self.seed, 0, INT_MAX))


def params_per_prompt(params: object, n_prompts: int) -> list[SamplingParams]:
    """Give each prompt its SamplingParams, from None, one for all, or as many as there are prompts."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * n_prompts
    if not isinstance(params, Sequence) or not all(isinstance(one, SamplingParams) for one in params):
        raise TypeError(f"sampling_params must be SamplingParams, one or one per prompt, got {params!r}")
    if len(params) != n_prompts:
        raise ValueError(f"sampling_params must be one, or as many as prompts ({n_prompts}), got {len(params)}")
    return list(params)


def checked_text(name: str, text: object) -> str:
    """Return `text` if it is a string that UTF-8 can hold: one without half of a surrogate pair."""
    if not isinstance(text, str):
        raise TypeError(f"{name} must be a string, got {text!r}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} must be valid Unicode, got {text[error.start]!r} at {error.start}") from None
    return text


class EngineOptions(TypedDict, total=False):
    """The keywords of `LLM`: those of `EngineConfig`, for type checkers."""

    n_ctx: int
    n_parallel: int
    n_gpu_layers: int
    n_threads: int
    n_threads_batch: int
    n_batch: int
    kv_type: KVType
    head: Head
    n_candidates: int | None
    policy: Policy
    objective: Objective
    costs: CostSource
    calibration: str | os.PathLike[str] | Calibration | None
    draft_window: int
    max_queue: int
    prefill_chunk: int
    prefix_reuse: bool
    flash_attention: bool | None
    use_mmap: bool
    check_tensors: bool
    cpu_kernels: CpuKernels


_ENGINE_RANGES = {
    "n_ctx": (0, 2**24),
    "n_parallel": (1, 256),
    "n_gpu_layers": (-1, INT_MAX),
    "n_threads": (0, 512),
    "n_threads_batch": (0, 512),
    "n_batch": (1, 2**14),
    "draft_window": (1, INT_MAX),
    "max_queue": (1, INT_MAX),
    "prefill_chunk": (1, INT_MAX),
}


def default_candidates(head: str, head_type: str) -> int:
    """Return the candidates per slot that a form of the sequential head needs with a type of Markov head."""
    return 64 if (head, head_type) == ("candidates", "vanilla") else 256
