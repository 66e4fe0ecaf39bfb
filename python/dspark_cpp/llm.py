"""The public class: prompts in, text out.

Owns: the models, the engine and its thread; turning a call's arguments into requests and their events into answers.
Must not know: how text is cut (chat), how events travel (engine_loop), how a token is chosen (_core). Any thread.
"""

from __future__ import annotations

import os
import secrets
import time
import weakref
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, Unpack, overload

from dspark_cpp import _core
from dspark_cpp.chat import Message, ReplyBuilder, render_chat, without_second_bos
from dspark_cpp.config import (
    EngineConfig,
    EngineOptions,
    SamplingParams,
    checked_text,
    params_per_prompt,
)
from dspark_cpp.core_objects import load_models, make_engine, request_options
from dspark_cpp.cost_cache import prepare_costs
from dspark_cpp.engine_loop import Deliver, EngineLoop, RequestGroup
from dspark_cpp.errors import QueueFullError
from dspark_cpp.results import Chunk, Completion

__all__ = ["LLM", "Prompt"]

Prompt = str | Sequence[int]

_QUEUE_RETRY_SECONDS = 0.02
_LEARNED_STEPS = 200  # an engine that ran fewer has nothing to tell of costs


@dataclass(slots=True)
class _Work:
    """A request before it is submitted: checked, tokenized, its answer still empty."""

    prompt: list[int]
    options: _core.RequestOptions
    reply: ReplyBuilder


class LLM:
    """A target model and, with a drafter, its speculation.

    Calls may come from many threads at once: they share the engine's batches. Ctrl-C ends a call and cancels its
    requests. An LLM does not survive `os.fork`; make one in each process.

    Parameters
    ----------
    model : path or Model
        GGUF file of the target, or a target that is loaded already: several engines may share one.
    draft : path or Model, optional
        GGUF file of its drafter; None is plain decoding.
    **options
        The fields of `EngineConfig`: n_ctx, n_parallel, n_gpu_layers, n_threads, head, policy and more.

    Raises
    ------
    ModelLoadError
        A file that cannot be read or used.
    ModelMismatchError
        A drafter that was made for another target.
    TypeError, ValueError
        An unknown or bad option.

    Examples
    --------
    >>> with LLM("target.gguf", "drafter.gguf", n_parallel=4) as llm:  # doctest: +SKIP
    ...     for completion in llm.generate(["One", "Two"], SamplingParams(temperature=0)):
    ...         print(completion.text, completion.stats.accepted_length)
    """

    # For `dspark bench` alone, in a subclass: accept events are drawn, and what comes out is no text.
    _synthetic_acceptance: ClassVar[_core.SyntheticAcceptance | None] = None

    def __init__(
        self,
        model: str | os.PathLike[str] | _core.Model,
        draft: str | os.PathLike[str] | _core.Model | None = None,
        **options: Unpack[EngineOptions],
    ) -> None:
        config = EngineConfig(**options)
        self._model, self._drafter = load_models(model, draft, config)
        engine = make_engine(self._model, self._drafter, config, self._synthetic_acceptance)
        self._n_ctx = engine.n_ctx
        self._engine = engine
        self._cost_cache = prepare_costs(self._model, self._drafter, engine, config)
        self._loop = EngineLoop(engine)
        self._finalizer = weakref.finalize(self, self._loop.close, wait=False)

    @classmethod
    def demo(cls, **options: Unpack[EngineOptions]) -> Self:
        """Load the small pair that comes with the package."""
        folder = Path(__file__).parent / "demo"
        return cls(folder / "target.gguf", folder / "drafter.gguf", **options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        drafter = None if self._drafter is None else self._drafter.path
        return f"LLM({self._model.path!r}, {drafter!r}{', closed' if self.closed else ''})"

    def close(self) -> None:
        """Free the engine. Calls in progress raise EngineClosedError, as do later ones. Idempotent."""
        if self._finalizer.detach() is None:
            return
        self._loop.close()
        if self._cost_cache is not None and self._engine.stats.n_steps >= _LEARNED_STEPS:
            self._cost_cache.add(self._engine.costs)

    @property
    def closed(self) -> bool:
        """Whether requests are refused."""
        return self._loop.is_closed

    @property
    def model(self) -> _core.Model:
        """The target."""
        return self._model

    @property
    def drafter(self) -> _core.Model | None:
        """The drafter."""
        return self._drafter

    @property
    def loop(self) -> EngineLoop:
        """The thread that owns the engine, for callers that want events rather than text."""
        return self._loop

    @property
    def stats(self) -> _core.EngineStats:
        """Totals of the engine since it was made."""
        return self._engine.stats

    @property
    def costs(self) -> _core.CostCurves:
        """What passes cost on this machine, with what was learned since; waits for a running step."""
        return self._engine.costs

    @property
    def n_ctx(self) -> int:
        """Most tokens of one request, prompt and output together."""
        return self._n_ctx

    @property
    def can_shift(self) -> bool:
        """Whether `SamplingParams.context_shift` is possible: not with a recurrent state or a sliding window."""
        return self._engine.can_shift

    @property
    def engine(self) -> _core.Engine:
        """The engine, for its figures; requests go through the methods here."""
        return self._engine

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Text to token ids.

        Parameters
        ----------
        text : str
        add_special : bool
            Add the beginning-of-text token if the model wants one.
        parse_special : bool
            Read the names of special tokens as those tokens, not as text.

        Returns
        -------
        list of int
        """
        return self._model.tokenize(checked_text("text", text), add_special, parse_special)

    def detokenize(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """Token ids to text; `special` shows special tokens by name. Bytes that are no UTF-8 become U+FFFD."""
        return self._model.detokenize(self._checked_tokens(tokens), special).decode("utf-8", "replace")

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Complete one prompt or many; up to `n_parallel` of them run at the same time.

        Parameters
        ----------
        prompts : str, sequence of int, or a sequence of those
            Text (special tokens may be written by name) or token ids.
        sampling_params : SamplingParams or sequence of them, optional
            For all prompts, or one per prompt.

        Returns
        -------
        list of Completion, one per prompt, in their order

        Raises
        ------
        TypeError, ValueError
            A bad argument, found before anything runs.
        ContextFullError
            A prompt that does not fit into `n_ctx`.
        EngineClosedError
            The LLM is closed, or was closed meanwhile.
        DecodeError
            A forward pass failed.
        """
        batch = _as_batch(prompts)
        params = params_per_prompt(sampling_params, len(batch))
        works = [self._prepare(prompt, one) for prompt, one in zip(batch, params, strict=True)]
        self._finish_all(works)
        return [work.reply.completion() for work in works]

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Generator[Chunk]:
        """Complete one prompt piece by piece.

        The request starts with the first piece asked for; closing the iterator cancels it.

        Parameters
        ----------
        prompt : str or sequence of int
            Text or token ids.
        sampling_params : SamplingParams, optional
            Its options.

        Yields
        ------
        Chunk
            What the rounds since the last one added; the last one has `finish_reason` and `stats`.

        Raises
        ------
        Exception
            As `generate`, and QueueFullError when `max_queue` requests are waiting already.
        """
        [params] = params_per_prompt(sampling_params, 1)
        return self._stream(self._prepare(prompt, params))

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        stream: Literal[False] = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        enable_thinking: bool = True,
    ) -> Completion: ...

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        stream: Literal[True],
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        enable_thinking: bool = True,
    ) -> Generator[Chunk]: ...

    def chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        stream: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        enable_thinking: bool = True,
    ) -> Completion | Generator[Chunk]:
        """Answer a conversation.

        Parameters
        ----------
        messages : sequence of mapping
            OpenAI form: {"role": "user", "content": "..."} and so on.
        sampling_params : SamplingParams, optional
            Options of the answer.
        stream : bool
            Return an iterator of chunks instead of a completion.
        tools, template, enable_thinking
            As for `dspark_cpp.chat.render_chat`.

        Returns
        -------
        Completion or iterator of Chunk
            As `generate` or `stream` would.

        Raises
        ------
        ValueError
            No messages, a message without a role, or a model without a template.
        """
        text = render_chat(self._model, messages, tools=tools, template=template, enable_thinking=enable_thinking)
        prompt = without_second_bos(self._model, self.tokenize(text))
        if stream:
            return self.stream(prompt, sampling_params)
        [completion] = self.generate(prompt, sampling_params)
        return completion

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        deliver: Deliver,
        *,
        grammar: _core.Grammar | None = None,
    ) -> int:
        """Queue a request and have its events delivered: the form for servers, which wait for many at once.

        Parameters
        ----------
        prompt : sequence of int
            Token ids.
        params : SamplingParams
            Options; `stop` is the caller's business here, and without `seed` a fresh one is drawn.
        deliver : callable
            As for `EngineLoop.submit`.
        grammar : Grammar, optional
            What the text must obey.

        Returns
        -------
        int
            The request's id, for `cancel`.

        Raises
        ------
        ValueError, ContextFullError, QueueFullError, EngineClosedError
            As the engine finds.
        """
        seed = secrets.randbits(64) if params.seed is None else params.seed
        return self._loop.submit(prompt, request_options(params, seed, grammar), deliver)

    def cancel(self, request_id: int) -> bool:
        """End a request of `submit` within one step; its last event still comes. False if it has already ended."""
        return self._loop.cancel(request_id)

    # ---- one call's requests ----

    def _prepare(self, prompt: Prompt, params: SamplingParams) -> _Work:
        tokens = self._tokens_of(prompt)
        seed = secrets.randbits(64) if params.seed is None else params.seed
        reply = ReplyBuilder(self._model, params, seed)
        return _Work(tokens, request_options(params, seed), reply)

    def _tokens_of(self, prompt: Prompt) -> list[int]:
        tokens = self.tokenize(prompt) if isinstance(prompt, str) and prompt else self._checked_tokens(prompt)
        if not tokens:
            raise ValueError(f"prompt must hold at least one token, got {prompt!r}")
        return tokens

    def _checked_tokens(self, tokens: object) -> list[int]:
        if not isinstance(tokens, Sequence) or isinstance(tokens, bytes) or (isinstance(tokens, str) and tokens):
            raise TypeError(f"a prompt must be a string or a sequence of token ids, got {tokens!r}")
        return [_checked_token(token, self._model.n_vocab) for token in tokens]

    def _finish_all(self, works: Sequence[_Work]) -> None:
        waiting = deque(works)
        running: dict[int, ReplyBuilder] = {}
        with RequestGroup(self._loop) as group:
            _submit_some(group, waiting, running)
            while running:
                event = group.next_event()
                reply = running[event.request_id]
                reply.feed(event)
                if reply.is_finished:
                    del running[event.request_id]
                    _submit_some(group, waiting, running)
                elif reply.is_stopped:
                    group.cancel(event.request_id)

    def _stream(self, work: _Work) -> Generator[Chunk]:
        reply = work.reply
        with RequestGroup(self._loop) as group:
            request_id = group.submit(work.prompt, work.options)
            while not reply.is_finished:
                chunk = reply.feed(group.next_event())
                if reply.is_stopped and not reply.is_finished:
                    group.cancel(request_id)
                if chunk.token_ids or chunk.finish_reason:
                    yield chunk


def _submit_some(group: RequestGroup, waiting: deque[_Work], running: dict[int, ReplyBuilder]) -> None:
    """Submit until all are in or the queue is full; blocks only while there is nothing of our own to wait for."""
    while waiting:
        try:
            running[group.submit(waiting[0].prompt, waiting[0].options)] = waiting[0].reply
        except QueueFullError:
            if running:
                return
            time.sleep(_QUEUE_RETRY_SECONDS)
        else:
            waiting.popleft()


def _as_batch(prompts: object) -> list[Any]:
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes):
        raise TypeError(f"prompts must be a string, token ids, or a sequence of those, got {prompts!r}")
    if not prompts:
        raise ValueError("prompts must hold at least one prompt, got none")
    is_one_prompt = not isinstance(prompts[0], str | Sequence)
    return [prompts] if is_one_prompt else list(prompts)


def _checked_token(token: object, n_vocab: int) -> int:
    if isinstance(token, bool) or not isinstance(token, Integral):
        raise TypeError(f"token ids must be integers, got {token!r}")
    token_id = int(token)
    if not 0 <= token_id < n_vocab:
        raise ValueError(f"token ids must be at least 0 and below {n_vocab}, got {token_id}")
    return token_id
