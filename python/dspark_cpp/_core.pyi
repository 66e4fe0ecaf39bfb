"""The C++ extension. Everything here is thin: the public API is `dspark_cpp.LLM`."""

from collections.abc import Sequence
from typing import TypedDict, final

import numpy as np
import numpy.typing as npt

__version__: str
llama_cpp_commit: str

class DeviceInfo:
    """One device llama.cpp can use."""

    @property
    def name(self) -> str: ...
    @property
    def description(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def memory_free_bytes(self) -> int: ...
    @property
    def memory_total_bytes(self) -> int: ...

class BuildInfo:
    """What this build is and what it runs on."""

    @property
    def version(self) -> str: ...
    @property
    def llama_cpp_commit(self) -> str: ...
    @property
    def system_info(self) -> str: ...
    @property
    def backends(self) -> list[str]: ...
    @property
    def requested_backends(self) -> list[str]: ...
    @property
    def devices(self) -> list[DeviceInfo]: ...

def build_info() -> BuildInfo: ...
def set_log_level(level: int) -> None: ...
def quantize_model(source: str, destination: str, type_name: str, keep: Sequence[str], n_threads: int = 0) -> None: ...

class DrafterInfo:
    """What a drafter GGUF says about itself."""

    @property
    def block_size(self) -> int: ...
    @property
    def target_layers(self) -> list[int]: ...
    @property
    def mask_token(self) -> int: ...
    @property
    def head_type(self) -> str: ...
    @property
    def markov_rank(self) -> int: ...
    @property
    def sample_from_anchor(self) -> bool: ...
    @property
    def is_causal(self) -> bool: ...
    @property
    def has_confidence(self) -> bool: ...
    @property
    def confidence_with_markov(self) -> bool: ...
    @property
    def owns_embedding(self) -> bool: ...
    @property
    def owns_output(self) -> bool: ...
    @property
    def n_vocab_draft(self) -> int: ...

@final
class Model:
    """A loaded GGUF: target or drafter. Immutable, may be shared by threads."""

    @staticmethod
    def load_target(
        path: str,
        *,
        n_gpu_layers: int = -1,
        use_mmap: bool = True,
        check_tensors: bool = False,
        use_kernels: bool = True,
    ) -> Model: ...
    @staticmethod
    def load_drafter(
        path: str,
        target: Model,
        *,
        n_gpu_layers: int = -1,
        use_mmap: bool = True,
        check_tensors: bool = False,
        use_kernels: bool = True,
    ) -> Model: ...
    @property
    def path(self) -> str: ...
    @property
    def architecture(self) -> str: ...
    @property
    def description(self) -> str: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def uses_kernels(self) -> bool: ...  # our products on the CPU; false: ggml's
    @property
    def n_params(self) -> int: ...
    @property
    def n_vocab(self) -> int: ...
    @property
    def n_embd(self) -> int: ...
    @property
    def n_layer(self) -> int: ...
    @property
    def n_ctx_train(self) -> int: ...
    @property
    def can_tap_layers(self) -> bool: ...
    @property
    def can_roll_back(self) -> bool: ...
    @property
    def metadata(self) -> dict[str, str]: ...
    @property
    def bos_token(self) -> int: ...
    @property
    def eos_token(self) -> int: ...
    @property
    def adds_bos(self) -> bool: ...
    @property
    def chat_template(self) -> str | None: ...
    @property
    def drafter_info(self) -> DrafterInfo: ...
    def tokenize(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]: ...
    def token_to_piece(self, token: int, special: bool = False) -> bytes: ...
    def detokenize(self, tokens: Sequence[int], special: bool = False) -> bytes: ...
    def is_end_of_generation(self, token: int) -> bool: ...
    def is_control(self, token: int) -> bool: ...
    def apply_chat_template(
        self,
        messages_json: str,
        tools_json: str = "",
        template_override: str = "",
        add_generation_prompt: bool = True,
        enable_thinking: bool = True,
    ) -> str: ...

@final
class Grammar:
    """A GBNF grammar over a model's tokens; lazy ones bind from a trigger on. Immutable: requests take copies."""

    def __init__(
        self,
        model: Model,
        gbnf: str,
        *,
        is_lazy: bool = False,
        trigger_words: Sequence[str] = (),
        trigger_patterns: Sequence[str] = (),
        prefill: str = "",  # text that the prompt already holds of what the grammar describes
    ) -> None: ...
    def allows(self, model: Model, text: str) -> bool: ...  # whether `text` can begin what the grammar describes

@final
class Embedder:
    """Pooled states of a target, one text at a time; calls wait for each other."""

    def __init__(self, model: Model, *, n_ctx: int = 0, n_threads: int = 0) -> None: ...
    @property
    def n_ctx(self) -> int: ...
    @property
    def pooling(self) -> str: ...  # mean | cls | last
    def embed(self, tokens: Sequence[int]) -> list[float]: ...  # (n_embd,), not normalised

@final
class ChatParser:
    """Reads content, reasoning and tool calls out of a model's text; `plan_json` comes from `plan_chat`."""

    def __init__(self, plan_json: str, parse_tool_calls: bool = True) -> None: ...
    def parse(self, text: str, is_partial: bool) -> str: ...  # JSON: content, reasoning_content, tool_calls

def plan_chat(request_json: str) -> str: ...
def json_schema_to_grammar(schema_json: str) -> str: ...

@final
class RequestOptions:
    """One request's options as the engine takes them; all keyword-only, all validated (ValueError)."""

    def __init__(
        self,
        *,
        max_tokens: int = 128,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        penalty_window: int = -1,  # newest tokens that the three look at; 0: none, -1: all
        logit_bias: dict[int, float] = ...,
        seed: int = 0,
        ignore_eos: bool = False,
        context_shift: bool = False,  # at a full context forget the older half and go on
        n_keep: int = 0,  # leading tokens that a shift keeps; -1: the prompt
        n_logprobs: int = -1,  # -1: none; 0: the chosen token's; n: also the n best
        verification: str = "auto",  # auto | exact | rejection | block
        policy: str | None = None,  # None: the engine's
        draft_limit: int = -1,  # -1: as the policy says; 0: off; n: at most n drafted tokens a round
        trace: bool = False,  # events carry a RoundRecord for every decode round
        grammar: Grammar | None = None,  # verified by `exact` alone; the request works on a copy
    ) -> None: ...
    @property
    def draft_limit(self) -> int: ...

class TokenLogprobs:
    @property
    def logprob(self) -> float: ...
    @property
    def top(self) -> list[tuple[int, float]]: ...

class RequestStats:
    """Counts and times of one request; see `dspark_cpp.RequestStats` for the meaning of each."""

    @property
    def n_prompt(self) -> int: ...
    @property
    def n_reused(self) -> int: ...  # of those, found in the caches
    @property
    def n_discarded(self) -> int: ...  # tokens that context shifts have forgotten
    @property
    def n_rounds(self) -> int: ...
    @property
    def n_drafted(self) -> int: ...
    @property
    def n_scheduled(self) -> int: ...
    @property
    def n_accepted(self) -> int: ...
    @property
    def n_committed(self) -> int: ...
    @property
    def n_parked(self) -> int: ...
    @property
    def n_probes(self) -> int: ...
    @property
    def park_tokens(self) -> float: ...
    @property
    def park_extra_ms(self) -> float: ...
    @property
    def park_plain_ms(self) -> float: ...
    @property
    def scheduled_per_position(self) -> list[int]: ...
    @property
    def accepted_per_position(self) -> list[int]: ...
    @property
    def queue_ms(self) -> float: ...
    @property
    def prefill_ms(self) -> float: ...
    @property
    def draft_ms(self) -> float: ...
    @property
    def verify_ms(self) -> float: ...
    @property
    def host_ms(self) -> float: ...
    @property
    def plain_ms(self) -> float: ...  # what its rounds' tokens would have taken without a drafter; 0: unknown

class RoundRecord:
    """One decode round of a traced request: what calibration learns from."""

    @property
    def n_drafted(self) -> int: ...  # 0 in a round without a draft
    @property
    def prefix_len(self) -> int: ...  # of those, sent to the target
    @property
    def n_accepted(self) -> int: ...  # as the rule decided, not cut at an end of text
    @property
    def confidence_logits(self) -> list[float]: ...  # (n_drafted,), uncalibrated; empty without a confidence head
    @property
    def draft_ms(self) -> float: ...  # of the step, shared by all requests in it
    @property
    def verify_ms(self) -> float: ...

class Event:
    """What a turn's steps did for one request: committed tokens and, at the end, why it ended."""

    @property
    def request_id(self) -> int: ...
    @property
    def tokens(self) -> list[int]: ...
    @property
    def drafted(self) -> list[bool]: ...  # per token: came from an accepted draft
    @property
    def logprobs(self) -> list[TokenLogprobs]: ...
    @property
    def rounds(self) -> list[RoundRecord]: ...  # of a traced request: its decode rounds
    @property
    def finish_reason(self) -> str | None: ...  # stop | length | context_full | cancelled | error
    @property
    def error(self) -> str: ...
    @property
    def progress(self) -> tuple[int, float, float]: ...  # of the rounds so far: n_committed, their ms, plain_ms
    @property
    def stats(self) -> RequestStats | None: ...  # with finish_reason only

class EngineStats:
    """Totals since the engine was made; times in milliseconds."""

    @property
    def n_steps(self) -> int: ...
    @property
    def n_prefill_steps(self) -> int: ...  # of those, with rows of prompts
    @property
    def n_prefill_tokens(self) -> int: ...
    @property
    def n_reused(self) -> int: ...  # prompt tokens found in the caches instead
    @property
    def n_drafted(self) -> int: ...
    @property
    def n_scheduled(self) -> int: ...
    @property
    def n_accepted(self) -> int: ...
    @property
    def n_committed(self) -> int: ...
    @property
    def n_parked(self) -> int: ...
    @property
    def n_probes(self) -> int: ...
    @property
    def prefill_ms(self) -> float: ...  # steps with rows of prompts; the times below are of all others
    @property
    def draft_ms(self) -> float: ...
    @property
    def verify_ms(self) -> float: ...
    @property
    def head_ms(self) -> float: ...
    @property
    def inject_ms(self) -> float: ...
    @property
    def sample_ms(self) -> float: ...
    @property
    def host_ms(self) -> float: ...

class CostCurves(TypedDict):
    """What passes cost: (size, milliseconds), ascending sizes; a plain dict."""

    verify: list[tuple[int, float]]  # rows, each with logits, of a pass unlike the one before it
    plain: list[tuple[int, float]]  # rows of plain decoding: passes of one shape; empty: as verify
    prefill: list[tuple[int, float]]  # rows without logits
    draft: list[tuple[int, float]]  # blocks drafted in one pass
    inject: list[tuple[int, float]]  # context rows written into the drafter's cache before a draft
    verify_ms_per_row_cell: float  # what attention adds for one row, per cell of the cache in use
    draft_ms_per_block_cell: float

@final
class SyntheticAcceptance:
    """Accept events drawn from rates instead of verified, for timing random weights: what comes out is no text."""

    def __init__(
        self,
        *,
        rates: Sequence[Sequence[float]],  # per domain and position: P(accepted | those before it were)
        spread: float = 1.5,  # of a round's difficulty, in logits
        noise: float = 0.7,  # of what the confidence sees of it, in its standard deviations
        bias: float = 0.0,  # added to the confidence logits
        seed: int = 0,
    ) -> None: ...
    def draw_rounds(
        self, block_size: int, request_seed: int, n_rounds: int
    ) -> tuple[list[list[float]], list[int]]: ...  # confidence logits (n_rounds, block_size), accepted (n_rounds,)

@final
class Engine:
    """Many requests over one target and one drafter. `step` belongs to one thread; the rest may be called by any."""

    def __init__(
        self,
        target: Model,
        drafter: Model | None = None,
        *,
        n_ctx: int = 0,  # tokens of one request, prompt included; 0: the model's, at most 4096
        n_parallel: int = 1,
        n_batch: int = 512,  # most rows of one target forward pass
        n_threads: int = 0,  # 0: the machine's physical cores
        n_threads_batch: int = 0,
        kv_type: str = "f16",
        head: str = "candidates",  # candidates | full | graph
        n_candidates: int = 256,
        policy: str = "full",  # off | full | fixed:n | threshold:p | algorithm1 | adaptive
        objective: str = "throughput",  # throughput | latency
        # rule, temperature, sts, acceptance, offsets, maps
        calibration: Sequence[
            tuple[str, float, Sequence[float], Sequence[float], Sequence[float], Sequence[float]]
        ] = [],
        draft_window: int = 4096,
        max_queue: int = 512,
        prefill_chunk: int = 64,  # most rows of prompts in a pass while anyone decodes
        prefix_reuse: bool = True,  # finished requests leave their cells for later ones that begin alike
        flash_attention: bool | None = None,  # None: on, but for an f32 cache on the CPU
        n_workers: int = -1,  # threads that share reading logits; -1: n_threads where a GPU computes, else none
        synthetic_acceptance: SyntheticAcceptance | None = None,  # for timing alone: no text
    ) -> None: ...
    def submit(self, prompt: Sequence[int], options: RequestOptions) -> int: ...
    def step(self) -> list[Event]: ...  # GIL released
    def turn(self, budget_ms: float) -> list[Event]: ...  # steps for so long; GIL released
    def cancel(self, request_id: int) -> bool: ...
    def close(self) -> None: ...
    # Only while nothing runs. look: a few sizes, their least times; the engine keeps the costs that it has.
    def measure_costs(self, *, budget_ms: float = 3000.0, look: bool = False) -> CostCurves: ...
    def set_costs(self, curves: CostCurves) -> None: ...
    @property
    def costs(self) -> CostCurves: ...  # with what was learned; waits for a running step
    @property
    def settings(self) -> dict[str, int | str | bool]: ...  # options with every default filled in
    @property
    def speedup(self) -> float: ...  # recent tokens per time against plain decoding, estimated; at least 1
    @property
    def has_work(self) -> bool: ...
    @property
    def n_ctx(self) -> int: ...
    @property
    def can_shift(self) -> bool: ...  # requests may ask for a context shift
    @property
    def n_running(self) -> int: ...
    @property
    def n_queued(self) -> int: ...
    @property
    def closed(self) -> bool: ...
    @property
    def stats(self) -> EngineStats: ...
    @property
    def memory_bytes(self) -> dict[str, int]: ...  # target_context, draft_context, target_weights, drafter_weights
    def cache_positions(
        self,
    ) -> list[tuple[int, int, int]]: ...  # per running request: id, last target, last draft position

# Matrix kernels.

def kernel_types() -> list[str]: ...
def kernel_instruction_set() -> str: ...
def kernel_instruction_sets() -> list[str]: ...
def set_kernel_instruction_set(name: str) -> None: ...
def n_math_threads() -> int: ...
def quantize_rows(type_name: str, values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]: ...

@final
class MatrixBench:
    def __init__(
        self, type_name: str, rows: npt.NDArray[np.uint8], *, n_values: int, n_matrices: int = 1, n_threads: int = 1
    ) -> None: ...
    @property
    def can_repack(self) -> bool: ...
    def multiply(self, path: str, x: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float32], float]: ...
