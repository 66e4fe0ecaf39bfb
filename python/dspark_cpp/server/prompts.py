"""From a request to what the engine takes: tokens, options, grammar, and how the answer is to be read.

Event loop only; tokenizing long texts runs in a thread.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dspark_cpp import _core
from dspark_cpp.chat import without_second_bos
from dspark_cpp.config import SamplingParams
from dspark_cpp.server.loaded_model import LoadedModel
from dspark_cpp.server.problems import BadRequestError
from dspark_cpp.server.requests import ChatRequest, GenerationRequest

__all__ = ["Job", "checked_tokens", "prepare"]

_MOST_CONTEXTS = 10  # as in Ollama: an answer that goes on past the context ends at ten times its length
_FIM = {"pre": ("fim_pre", "prefix"), "suf": ("fim_suf", "suffix"), "mid": ("fim_mid", "middle")}


@dataclass(frozen=True, slots=True)
class Job:
    """A request as the engine takes it.

    Attributes
    ----------
    prompt
        Token ids.
    parser
        Reads tool calls and thinking out of the text; None: all of it is content.
    shown
        Special tokens whose names are part of the text for `parser`.
    opening
        How the answer begins, in the prompt already.
    """

    prompt: list[int]
    params: SamplingParams
    grammar: _core.Grammar | None = None
    parser: _core.ChatParser | None = None
    shown: frozenset[int] = frozenset()
    opening: str = ""


async def prepare(model: LoadedModel, request: GenerationRequest) -> Job:
    """Render, tokenize and bound a request.

    Raises
    ------
    BadRequestError
        If the model cannot do what is asked, or the prompt does not fit.
    """
    limit = min(request.n_ctx or model.llm.n_ctx, model.llm.n_ctx)
    if request.chat is not None:
        job = await _prepare_chat(model, request, request.chat, limit)
    else:
        job = await _prepare_text(model, request, limit)
    n_room = limit - len(job.prompt)
    if n_room < 1:
        text = f"prompt must leave room for one token in the context of {limit} tokens, got {len(job.prompt)} tokens"
        raise BadRequestError(text, code="context_length_exceeded", param="messages" if request.chat else "prompt")
    # A grammar's text has lost its point with its beginning; a context below the engine's has nobody to shift it.
    can_go_on = request.shifts and job.grammar is None and limit == model.llm.n_ctx and model.llm.can_shift
    most = _MOST_CONTEXTS * limit if can_go_on else n_room
    n_tokens = most if request.max_tokens is None else min(request.max_tokens, most)
    n_keep = max(request.n_keep, -1)
    return replace(job, params=replace(job.params, max_tokens=n_tokens, context_shift=can_go_on, n_keep=n_keep))


# ---- conversations ----


async def _prepare_chat(model: LoadedModel, request: GenerationRequest, chat: ChatRequest, limit: int) -> Job:
    _check_abilities(model, chat)
    if chat.tool_choice == "required" and not (model.supports_thinking and chat.think is not False):
        return await _prepare_call(model, request, chat)
    plan, prompt = await _render(model, chat)
    if request.truncates and len(prompt) >= limit:
        plan, prompt = await _shorten(model, chat, limit)
    grammar = None
    if plan["grammar"]:
        grammar = await asyncio.to_thread(_grammar_of_plan, model, plan)
    return _chat_job(model, request, chat, plan, [*request.context, *prompt], grammar)


async def _prepare_call(model: LoadedModel, request: GenerationRequest, chat: ChatRequest) -> Job:
    """Prepare an answer that must be a call of a tool.

    llama.cpp's grammar for this lets any text come before the call, and a model that talks on never gets to it. So the
    answer begins with the mark of a call, as part of the prompt, where the format has one.
    """
    plan, prompt = await _render(model, replace(chat, tool_choice="auto"))
    if not plan["trigger_words"]:
        plan, prompt = await _render(model, chat)
        return _chat_job(model, request, chat, plan, prompt, await asyncio.to_thread(_grammar_of_plan, model, plan))
    mark = plan["trigger_words"][0]
    prompt += model.llm.tokenize(mark, add_special=False)
    grammar = await asyncio.to_thread(_core.Grammar, model.llm.model, plan["grammar"], prefill=mark)
    return replace(_chat_job(model, request, chat, plan, prompt, grammar), opening=mark)


def _chat_job(
    model: LoadedModel,
    request: GenerationRequest,
    chat: ChatRequest,
    plan: Mapping[str, Any],
    prompt: list[int],
    grammar: _core.Grammar | None,
) -> Job:
    needs_parser = bool(chat.tools) or bool(plan["supports_thinking"])
    parser = _core.ChatParser(json.dumps(plan), bool(chat.tools)) if needs_parser else None
    params = request.params
    if plan["stops"]:
        params = replace(params, stop=(*params.stop_strings, *plan["stops"]))
    shown = frozenset(_token_of(model, name) for name in plan["preserved_tokens"]) - {-1}
    return Job(prompt, params, grammar, parser, shown if parser else frozenset())


def _check_abilities(model: LoadedModel, chat: ChatRequest) -> None:
    if not model.has_template:
        raise BadRequestError(f"{model.entry.name} does not support chat: its file holds no usable template")
    if chat.tools and not model.can_call_tools:
        raise BadRequestError(f"{model.entry.name} does not support tools")
    if chat.think and not model.supports_thinking:
        raise BadRequestError(f'"{model.entry.name}" does not support thinking')


async def _render(model: LoadedModel, chat: ChatRequest) -> tuple[dict[str, Any], list[int]]:
    plan = await model.plan_chat(_template_input(chat))
    tokens = await asyncio.to_thread(model.llm.tokenize, plan["prompt"])
    return plan, without_second_bos(model.llm.model, tokens)


def _template_input(chat: ChatRequest) -> dict[str, Any]:
    request: dict[str, Any] = {"messages": list(chat.messages), "enable_thinking": chat.think is not False}
    if chat.tools:
        request |= {"tools": list(chat.tools), "tool_choice": chat.tool_choice}
        if chat.parallel_tool_calls is not None:
            request["parallel_tool_calls"] = chat.parallel_tool_calls
    if chat.json_schema is not None:
        request["json_schema"] = dict(chat.json_schema)
    if chat.effort:
        request["template_kwargs"] = {"reasoning_effort": chat.effort}
    if chat.messages[-1]["role"] == "assistant" and not chat.messages[-1].get("tool_calls"):
        request["continue_final_message"] = True  # an answer begun by the client goes on
    return request


async def _shorten(model: LoadedModel, chat: ChatRequest, limit: int) -> tuple[dict[str, Any], list[int]]:
    """Leave out the oldest messages, but never system messages and the last one, until the rest fits."""
    system = [message for message in chat.messages if message["role"] in ("system", "developer")]
    others = [message for message in chat.messages if message["role"] not in ("system", "developer")]
    low, high = 1, max(len(others) - 1, 1)  # how many to leave out: the fewest that suffice, found by halving
    while low < high:
        middle = (low + high) // 2
        _, prompt = await _render(model, replace(chat, messages=[*system, *others[middle:]]))
        low, high = (low, middle) if len(prompt) < limit else (middle + 1, high)
    return await _render(model, replace(chat, messages=[*system, *others[min(low, len(others) - 1) :]]))


def _grammar_of_plan(model: LoadedModel, plan: Mapping[str, Any]) -> _core.Grammar:
    return _core.Grammar(
        model.llm.model,
        plan["grammar"],
        is_lazy=plan["grammar_lazy"],
        trigger_words=plan["trigger_words"],
        trigger_patterns=plan["trigger_patterns"],
        prefill=plan["generation_prompt"],
    )


def _token_of(model: LoadedModel, name: str) -> int:
    """Return the token of this name, -1 if it takes several."""
    tokens = model.llm.tokenize(name, add_special=False)
    return tokens[0] if len(tokens) == 1 else -1


# ---- plain text ----


async def _prepare_text(model: LoadedModel, request: GenerationRequest, limit: int) -> Job:
    tokens = await asyncio.to_thread(_text_tokens, model, request)
    if request.truncates and len(tokens) >= limit:
        n_keep = min(max(request.n_keep, 0), limit // 2)
        tokens = tokens[:n_keep] + tokens[len(tokens) - (limit // 2 - n_keep) :] if limit > 2 else tokens[-1:]
    grammar = None
    if request.json_schema is not None:
        gbnf = await model.sandbox.grammar_of(request.json_schema)
        grammar = await asyncio.to_thread(_core.Grammar, model.llm.model, gbnf)
    return Job(tokens, request.params, grammar)


def _text_tokens(model: LoadedModel, request: GenerationRequest) -> list[int]:
    context = checked_tokens(model, request.context)
    if request.tokens is not None:
        return context + checked_tokens(model, request.tokens)
    text = request.text or ""
    if request.suffix:
        return context + _fill_in_middle(model, text, request.suffix)
    tokens = model.llm.tokenize(text, add_special=not context) if text else []
    if not tokens and not context:
        tokens = [model.llm.model.bos_token if model.llm.model.bos_token >= 0 else model.llm.model.eos_token]
    return context + tokens


def _fill_in_middle(model: LoadedModel, prefix: str, suffix: str) -> list[int]:
    marks = {part: _fim_token(model, names) for part, names in _FIM.items()}
    if min(marks.values()) < 0:
        raise BadRequestError(f"{model.entry.name} does not support insert")

    def plain(text: str) -> list[int]:
        return model.llm.tokenize(text, add_special=False, parse_special=False) if text else []

    return [marks["pre"], *plain(prefix), marks["suf"], *plain(suffix), marks["mid"]]


def _fim_token(model: LoadedModel, names: Sequence[str]) -> int:
    metadata = model.llm.model.metadata
    found = next((metadata[key] for name in names if (key := f"tokenizer.ggml.{name}_token_id") in metadata), "-1")
    return int(found) if 0 <= int(found) < model.llm.model.n_vocab else -1


def checked_tokens(model: LoadedModel, tokens: Sequence[int]) -> list[int]:
    """Return token ids as a list.

    Raises
    ------
    BadRequestError
        If one is none of the model's.
    """
    n_vocab = model.llm.model.n_vocab
    for token in tokens:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < n_vocab:
            raise BadRequestError(f"token ids must be integers in [0, {n_vocab}), got {str(token)[:40]}")
    return list(tokens)
