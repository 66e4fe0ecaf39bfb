"""llm: answers, seeds, log-probabilities, streaming, stop strings, threads, and what is refused."""

from __future__ import annotations

import math
import os
import threading
from dataclasses import replace

import pytest

pytest.importorskip("dspark_cpp._core")

from dspark_cpp import LLM, ContextFullError, ModelLoadError, QueueFullError, SamplingParams, _core
from dspark_cpp.chat import render_chat
from dspark_cpp.engine_loop import RequestGroup
from waiting import LIMIT_S, wait_until

GREEDY = SamplingParams(temperature=0, max_tokens=64)
ENDLESS = SamplingParams(temperature=0, max_tokens=100_000, ignore_eos=True)
SAMPLED = SamplingParams(max_tokens=40, seed=11, ignore_eos=True)


@pytest.fixture(scope="module")
def prompts(llm, questions):
    """Prompts in the chat form the pair was trained on."""
    template = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    return [template.format(question) for question in questions]


def tokens_of(completions):
    return [completion.token_ids for completion in completions]


# ---- answers ----


def test_greedy_text_is_the_same_with_speculation_off_and_on(llm, prompts):
    off = llm.generate(prompts, replace(GREEDY, draft="off"))
    on = llm.generate(prompts, replace(GREEDY, policy="full"))  # the default policy drafts only where that pays
    assert tokens_of(llm.generate(prompts, GREEDY)) == tokens_of(off)
    assert tokens_of(on) == tokens_of(off)
    assert [one.text for one in on] == [one.text for one in off]
    assert all(one.stats.n_drafted == 0 and not any(one.drafted) for one in off)
    assert sum(one.stats.n_accepted for one in on) > 0


def test_greedy_text_is_the_same_alone_and_among_others(llm, prompts):
    together = llm.generate(prompts, GREEDY)
    alone = [llm.generate(prompt, GREEDY)[0] for prompt in prompts]
    assert tokens_of(together) == tokens_of(alone)


def test_prompt_may_be_text_or_tokens(llm, prompts):
    text = prompts[0]
    [from_text] = llm.generate(text, GREEDY)
    [from_tokens] = llm.generate(llm.tokenize(text), GREEDY)
    mixed = llm.generate([text, llm.tokenize(text)], GREEDY)
    assert from_text.token_ids == from_tokens.token_ids == mixed[0].token_ids == mixed[1].token_ids


def test_each_prompt_may_have_its_own_params(llm, prompts):
    params = [replace(GREEDY, max_tokens=n, ignore_eos=True) for n in (1, 2, 3)]
    assert [len(one.token_ids) for one in llm.generate(prompts[:3], params)] == [1, 2, 3]


def test_text_is_what_the_tokens_say(llm, prompts):
    for completion in llm.generate(prompts, GREEDY):
        assert completion.text == llm.detokenize(completion.token_ids)


def test_text_ends_at_the_end_of_text_token(llm, prompts):
    completions = llm.generate(prompts, replace(GREEDY, max_tokens=400))
    assert any(one.finish_reason == "stop" for one in completions)
    for one in completions:
        assert not any(llm.model.is_end_of_generation(token) for token in one.token_ids)


def test_ignore_eos_goes_on(llm, prompts):
    [one] = llm.generate(prompts[0], replace(GREEDY, max_tokens=400, ignore_eos=True))
    assert (len(one.token_ids), one.finish_reason) == (400, "length")


def test_text_that_fills_the_context_ends_as_context_full(llm, prompts):
    [one] = llm.generate(prompts[0], ENDLESS)
    assert one.finish_reason == "context_full"
    assert one.stats.n_prompt + len(one.token_ids) == llm.n_ctx


def test_stats_add_up(llm, prompts):
    for one in llm.generate(prompts, replace(GREEDY, ignore_eos=True, policy="full")):  # drafts whatever they cost
        stats = one.stats
        assert stats.n_prompt > 0
        assert stats.n_committed == len(one.token_ids) - 1  # the prefill's token belongs to no round
        assert stats.n_committed == stats.n_rounds + stats.n_accepted
        assert sum(one.drafted) == stats.n_accepted == sum(stats.accepted_per_position)
        assert sum(stats.scheduled_per_position) == stats.n_scheduled <= stats.n_drafted
        assert stats.accepted_length == pytest.approx(stats.n_committed / stats.n_rounds)
        assert min(stats.prefill_ms, stats.draft_ms, stats.verify_ms) > 0


@pytest.mark.parametrize("verification", ["auto", "exact", "rejection", "block"])
@pytest.mark.parametrize("draft", ["auto", "off", 0, 2, 100])
def test_every_choice_of_verification_and_draft_runs(llm, prompts, verification, draft):
    [one] = llm.generate(prompts[0], replace(SAMPLED, verification=verification, draft=draft))
    assert len(one.token_ids) == 40
    limit = 7 if isinstance(draft, str) or draft > 7 else draft
    assert one.stats.n_scheduled <= (0 if draft == "off" else limit) * one.stats.n_rounds


def test_exact_sampling_is_the_same_with_speculation_off_and_on(llm, prompts):
    params = replace(SAMPLED, verification="exact")
    on, off = llm.generate(prompts, params), llm.generate(prompts, replace(params, draft="off"))
    assert tokens_of(on) == tokens_of(off)


# ---- seeds ----


def test_seed_decides_the_text(llm, prompts):
    first, again, other = (llm.generate(prompts, replace(SAMPLED, seed=seed)) for seed in (1, 1, 2))
    assert tokens_of(first) == tokens_of(again) != tokens_of(other)


def test_seed_is_independent_of_neighbours(llm, prompts):
    [alone] = llm.generate(prompts[0], SAMPLED)
    params = [SAMPLED, *(replace(SAMPLED, seed=i, max_tokens=10 + i) for i in range(5))]
    among = llm.generate([prompts[0], *prompts[1:6]], params)
    assert among[0].token_ids == alone.token_ids


def test_seed_is_drawn_for_each_request_and_told(llm, prompts):
    one, other = llm.generate([prompts[0]] * 2, replace(SAMPLED, seed=None, verification="exact"))
    assert one.seed != other.seed
    [again] = llm.generate(prompts[0], replace(SAMPLED, seed=one.seed))
    assert again.token_ids == one.token_ids


# ---- log-probabilities ----


def test_logprobs_are_a_log_softmax(llm, prompts):
    [one] = llm.generate(prompts[0], replace(GREEDY, logprobs=1000))
    assert len(one.logprobs) == len(one.token_ids)
    for entry, token in zip(one.logprobs, one.token_ids, strict=True):
        values = [value for _, value in entry.top]
        assert entry.token_id == token == entry.top[0][0]  # greedy: the chosen one is the best
        assert entry.logprob == values[0]
        assert values == sorted(values, reverse=True)
        # 1000 of a few thousand tokens hold nearly all of the probability, and never more than all of it
        assert 0.9 < math.fsum(map(math.exp, values)) < 1 + 1e-4


def test_logprobs_do_not_depend_on_speculation_or_temperature(llm, prompts):
    on, off = (llm.generate(prompts[0], replace(GREEDY, logprobs=3, draft=d))[0].logprobs for d in ("auto", "off"))
    for a, b in zip(on, off, strict=True):
        assert a.logprob == pytest.approx(b.logprob, abs=1e-3)  # f32 sums in another order
    [cold] = llm.generate(prompts[0], replace(GREEDY, logprobs=0))
    # Its prompt stood in the cache already: the same sums in batches of other sizes.
    assert [entry.logprob for entry in cold.logprobs] == pytest.approx([entry.logprob for entry in on], abs=1e-3)
    assert all(entry.top == () for entry in cold.logprobs)


def test_logprobs_are_absent_unless_asked_for(llm, prompts):
    assert llm.generate(prompts[0], replace(GREEDY, max_tokens=3))[0].logprobs is None


# ---- streaming ----


def test_stream_joins_to_the_same_answer(llm, prompts):
    params = replace(GREEDY, logprobs=1)
    [whole] = llm.generate(prompts[0], params)
    chunks = list(llm.stream(prompts[0], params))
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert [token for chunk in chunks for token in chunk.token_ids] == whole.token_ids
    assert [len(chunk.drafted) for chunk in chunks] == [len(chunk.token_ids) for chunk in chunks]
    assert sum(len(chunk.logprobs or ()) for chunk in chunks) == len(whole.token_ids)
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason == whole.finish_reason
    assert (
        chunks[-1].stats.n_committed == whole.stats.n_committed
    )  # which of them were drafted is the scheduler's choice


def test_stream_comes_in_rounds(llm, prompts):
    chunks = list(llm.stream(prompts[0], replace(GREEDY, ignore_eos=True)))
    assert 1 < len(chunks) <= chunks[-1].stats.n_rounds + 1  # and the prefill's; short rounds share a turn


def test_stream_splits_characters_only_between_chunks(llm, prompts):
    # Sampling at a high temperature yields bytes of all kinds, broken characters among them.
    params = replace(SAMPLED, temperature=5.0, max_tokens=200)
    [whole] = llm.generate(prompts[0], params)
    assert "".join(chunk.text for chunk in llm.stream(prompts[0], params)) == whole.text


def test_closing_a_stream_cancels_its_request(llm, prompts):
    stream = llm.stream(prompts[0], ENDLESS)
    assert next(stream).token_ids
    stream.close()
    wait_until(lambda: not llm._loop._engine.has_work)


def test_stream_that_is_never_started_leaves_nothing_behind(llm, prompts):
    llm.stream(prompts[0], ENDLESS).close()
    assert not llm._loop._engine.has_work


# ---- stop strings ----


def stop_across_tokens(llm, completion):
    """Return a text that begins inside one token and ends inside the next but one, and where it ends."""
    pieces = [llm.detokenize([token]) for token in completion.token_ids]
    for at in range(8, len(pieces) - 2):
        stop = pieces[at][-1:] + pieces[at + 1] + pieces[at + 2][:1]
        before = "".join(pieces[: at + 1])[:-1]
        if "\ufffd" not in stop and completion.text.find(stop) == len(before):
            return stop, before, at + 3
    raise AssertionError("no text that is there once")


def test_stop_string_is_found_across_tokens(llm, prompts):
    [whole] = llm.generate(prompts[0], GREEDY)
    stop, before, n_tokens = stop_across_tokens(llm, whole)
    params = replace(GREEDY, stop=["never there", stop])
    [cut] = llm.generate(prompts[0], params)
    assert (cut.text, cut.finish_reason) == (before, "stop")
    assert cut.token_ids == whole.token_ids[:n_tokens]
    assert len(cut.drafted) == n_tokens
    assert cut.stats.n_rounds > 0
    chunks = list(llm.stream(prompts[0], params))
    assert "".join(chunk.text for chunk in chunks) == before
    assert chunks[-1].finish_reason == "stop"
    wait_until(lambda: not llm._loop._engine.has_work)


def test_stop_string_ends_the_request_in_the_engine(llm, prompts):
    [whole] = llm.generate(prompts[0], GREEDY)
    stop = whole.text[5:8]
    [cut] = llm.generate(prompts[0], replace(ENDLESS, stop=stop))
    assert cut.text == whole.text[: whole.text.find(stop)]
    assert cut.stats.n_committed < 400  # it did not run on to the end of the context


# ---- chat ----


def test_chat_is_the_template_and_a_completion(llm, questions):
    messages = [{"role": "user", "content": questions[0]}]
    answer = llm.chat(messages, GREEDY)
    [same] = llm.generate(render_chat(llm.model, messages), GREEDY)
    assert answer.token_ids == same.token_ids
    assert "<|im_" not in answer.text
    streamed = "".join(chunk.text for chunk in llm.chat(messages, GREEDY, stream=True))
    assert streamed == answer.text


# ---- many callers ----


def test_threads_get_the_answers_they_would_get_alone(llm, prompts):
    expected = [llm.generate(prompt, GREEDY)[0].token_ids for prompt in prompts]
    found: dict[int, list[int]] = {}

    def ask(index: int) -> None:
        prompt = prompts[index % len(prompts)]
        stream = index % 2
        chunks = list(llm.stream(prompt, GREEDY)) if stream else llm.generate(prompt, GREEDY)
        found[index] = [token for chunk in chunks for token in chunk.token_ids]

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    assert found == {index: expected[index % len(prompts)] for index in range(8)}


def test_more_prompts_than_the_queue_holds(f32_target, f32_drafter, prompts):
    with LLM(f32_target, f32_drafter, n_ctx=256, n_threads=1, max_queue=2) as llm:
        params = replace(GREEDY, max_tokens=4)
        assert len(llm.generate([prompts[0]] * 9, params)) == 9


def test_stream_is_refused_when_the_queue_is_full(f32_target, f32_drafter, prompts):
    with LLM(f32_target, f32_drafter, n_ctx=4096, n_threads=1, max_queue=2) as llm, RequestGroup(llm._loop) as group:
        endless = llm._prepare(prompts[0], ENDLESS)
        for _ in range(3):
            group.submit(endless.prompt, endless.options)
            wait_until(lambda: llm._loop._engine.n_running == 1)
        with pytest.raises(QueueFullError, match="max_queue = 2"):
            next(llm.stream(prompts[0], ENDLESS))


# ---- what is refused ----


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ("", ValueError, "prompt must hold at least one token, got ''"),
        ([], ValueError, "prompts must hold at least one prompt, got none"),
        ([""], ValueError, "prompt must hold at least one token, got ''"),
        ([[]], ValueError, "prompt must hold at least one token"),
        ([-1], ValueError, "token ids must be at least 0 and below"),
        ([10**9], ValueError, "token ids must be at least 0 and below"),
        ([2**70], ValueError, "token ids must be at least 0 and below"),
        ([1.5], TypeError, "prompt|token ids must be integers"),
        ([True], TypeError, "token ids must be integers, got True"),
        ([1, "a"], TypeError, "token ids must be integers, got 'a'"),
        (["a", 1], TypeError, "a prompt must be a string or a sequence of token ids, got 1"),
        (None, TypeError, "prompts must be a string"),
        (5, TypeError, "prompts must be a string"),
        (b"bytes", TypeError, "prompts must be a string"),
        ([b"bytes"], TypeError, "a prompt must be a string"),
        ({"a": 1}, TypeError, "prompts must be a string"),
        ("a\ud800", ValueError, r"text must be valid Unicode, got '\\ud800' at 1"),
        ([5] * 512, ContextFullError, "n_ctx = 512"),
        ("word " * 5000, ContextFullError, "n_ctx = 512"),
    ],
)
def test_bad_prompts_are_refused(llm, prompt, error, message):
    with pytest.raises(error, match=message):
        llm.generate(prompt, GREEDY)


@pytest.mark.parametrize(
    ("params", "error"),
    [
        ({"max_tokens": 3}, TypeError),
        ([GREEDY], ValueError),
        ([], ValueError),
        ("greedy", TypeError),
        ([3, 4], TypeError),
    ],
)
def test_bad_sampling_params_are_refused(llm, params, error):
    with pytest.raises(error, match="sampling_params must be"):
        llm.generate(["a", "b"], params)


def test_logit_bias_outside_the_vocabulary_is_refused(llm):
    with pytest.raises(ValueError, match="logit_bias tokens must be in"):
        llm.generate("a", SamplingParams(logit_bias={10**8: 1.0}))


def test_one_bad_prompt_of_many_cancels_the_others(llm):
    with pytest.raises(ContextFullError):
        llm.generate(["a", [5] * 600, "b"], ENDLESS)
    wait_until(lambda: not llm._loop._engine.has_work)


def test_options_that_do_not_exist_are_refused(f32_target):
    with pytest.raises(TypeError, match="unexpected keyword argument 'n_contxt'"):
        LLM(f32_target, n_contxt=5)
    with pytest.raises(ValueError, match="head must be one of"):
        LLM(f32_target, head="fast")


@pytest.mark.parametrize("path", ["", "no/such/file.gguf", os.devnull, "."])
def test_files_that_are_no_models_are_refused(path):
    with pytest.raises(ModelLoadError):
        LLM(path)


@pytest.mark.parametrize("path", [None, 5, 1.5])
def test_paths_of_the_wrong_type_are_refused(path):
    with pytest.raises(TypeError):
        LLM(path)


def test_tokenize_and_back(llm):
    text = "def add(a, b):\n    return a + b  # häh 🙂"
    assert llm.detokenize(llm.tokenize(text)) == text
    with pytest.raises(TypeError, match="text must be a string"):
        llm.tokenize(5)
    with pytest.raises(ValueError, match="token ids must be"):
        llm.detokenize([10**6])


def test_repr_names_the_files(llm):
    assert "target.gguf" in repr(llm)
    assert "closed" not in repr(llm)


def test_core_is_what_the_package_says():
    import dspark_cpp

    assert dspark_cpp.__version__ == _core.__version__
    assert "LLM" in dir(dspark_cpp)
    with pytest.raises(AttributeError, match="has no attribute 'LMM'"):
        dspark_cpp.LMM  # noqa: B018


def test_what_load_timed_is_no_time_of_the_first_draft() -> None:
    with LLM.demo(n_ctx=256) as llm:
        [answer] = llm.generate(["1 + 1 ="], SamplingParams(temperature=0.0, max_tokens=9, policy="fixed:7"))
    assert answer.stats.n_drafted > 0
    assert answer.stats.draft_ms > 0
