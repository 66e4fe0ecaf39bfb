"""chat: text that is final, stop strings across tokens, answers from events, chat templates."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest

pytest.importorskip("dspark_cpp._core")

from dspark_cpp import DecodeError, SamplingParams
from dspark_cpp.chat import ReplyBuilder, TextStream, render_chat, without_second_bos
from dspark_cpp.results import RequestStats


def pieces_of(text: str, *sizes: int) -> list[bytes]:
    """Cut the UTF-8 of a text into pieces of the sizes given, over and over."""
    data, at, pieces = text.encode(), 0, []
    for size in itertools.cycle(sizes):
        if at >= len(data):
            return pieces
        pieces.append(data[at : at + size])
        at += size
    raise AssertionError


def push_all(stream: TextStream, pieces: list[bytes]) -> list[str]:
    return [*(stream.push(piece) for piece in pieces), stream.finish()]


@pytest.mark.parametrize("sizes", [(1,), (2,), (3, 1), (5, 2, 1)])
def test_text_stream_never_shows_half_a_character(sizes):
    text = "aé漢🙂\u200d🎉 end"
    shown = push_all(TextStream(), pieces_of(text, *sizes))
    assert "".join(shown) == text
    assert not any("\ufffd" in piece for piece in shown)


def test_text_stream_replaces_bytes_that_are_no_text():
    assert "".join(push_all(TextStream(), [b"a\xff", b"b", b"\xe2\x82"])) == "a\ufffdb\ufffd"


def test_text_stream_shows_text_at_once_without_stop_strings():
    assert push_all(TextStream(), [b"ab", b"c"]) == ["ab", "c", ""]


@pytest.mark.parametrize("sizes", [(1,), (2,), (3,), (7, 1), (100,)])
@pytest.mark.parametrize(
    ("stop", "text", "expected"),
    [
        (("END",), "one END two", "one "),
        (("END",), "ENENDx", "EN"),
        (("aab",), "aaab", "a"),
        (("b", "abc"), "xabc", "xa"),
        (("abc", "bcd"), "xabcd", "x"),
        (("\n\n",), "a\nb\n\nc", "a\nb"),
        (("🙂",), "smile 🙂!", "smile "),
        (("never",), "nev neve", "nev neve"),
    ],
)
def test_text_stream_cuts_before_a_stop_string(stop, text, expected, sizes):
    stream = TextStream(stop)
    shown = push_all(stream, pieces_of(text, *sizes))
    if sizes == (1,) or stop != ("b", "abc"):  # larger pieces may bring a longer, earlier match at the same time
        assert "".join(shown) == expected
    assert stream.is_stopped == (stop != ("never",))


def test_text_stream_holds_back_what_may_become_a_stop_string():
    stream = TextStream(["<end>"])
    assert stream.push(b"a<e") == "a"
    assert stream.push(b"n") == ""
    assert stream.push(b"x") == "<enx"
    assert stream.push(b"<en") == ""
    assert stream.finish() == "<en"


def test_text_stream_shows_nothing_after_a_stop_string():
    stream = TextStream(["."])
    assert push_all(stream, [b"a.b", b"c"]) == ["a", "", ""]


class Letters:
    """A model whose tokens are characters."""

    def token_to_piece(self, token: int, special: bool = False) -> bytes:
        return bytes([token]) if token else b""


def event(text: str, finish_reason: str | None = None, **fields):
    tokens = list(text.encode())
    stats = None if finish_reason is None else RequestStats(n_rounds=2, n_committed=5)
    defaults = {"drafted": [False] * len(tokens), "logprobs": [], "error": "", "stats": stats}
    return SimpleNamespace(tokens=tokens, finish_reason=finish_reason, **{**defaults, **fields})


def test_reply_ends_its_tokens_with_the_one_that_completed_the_stop_string():
    reply = ReplyBuilder(Letters(), SamplingParams(stop="cd"), seed=7)
    first, second = reply.feed(event("abc")), reply.feed(event("def"))
    assert (first.text, second.text) == ("ab", "")
    assert second.token_ids == list(b"d")
    assert reply.is_stopped
    assert not reply.is_finished
    last = reply.feed(event("gh", "cancelled"))
    assert (last.text, last.token_ids, last.finish_reason) == ("", [], "stop")
    completion = reply.completion()
    assert (completion.text, bytes(completion.token_ids), completion.seed) == ("ab", b"abcd", 7)


def test_reply_flushes_held_text_at_its_end():
    reply = ReplyBuilder(Letters(), SamplingParams(stop="xyz"), seed=0)
    assert reply.feed(event("axy")).text == "a"
    assert reply.feed(event("", "length")).text == "xy"
    assert reply.completion().finish_reason == "length"


def test_reply_hides_special_tokens_but_keeps_them_in_token_ids():
    reply = ReplyBuilder(Letters(), SamplingParams(), seed=0)
    reply.feed(event("a\0b", "length"))
    assert (reply.completion().text, reply.completion().token_ids) == ("ab", [97, 0, 98])


def test_reply_pairs_logprobs_with_tokens():
    entries = [SimpleNamespace(logprob=-float(i), top=[(1, -0.5)]) for i in range(3)]
    reply = ReplyBuilder(Letters(), SamplingParams(stop="b", logprobs=1), seed=0)
    reply.feed(event("abc", "length", logprobs=entries))
    logprobs = reply.completion().logprobs
    assert [(entry.token_id, entry.logprob, entry.top) for entry in logprobs] == [
        (97, 0.0, ((1, -0.5),)),
        (98, -1.0, ((1, -0.5),)),
    ]


def test_reply_without_tokens_has_logprobs_if_they_were_asked_for():
    for params, expected in ((SamplingParams(logprobs=0), []), (SamplingParams(), None)):
        reply = ReplyBuilder(Letters(), params, seed=0)
        reply.feed(event("", "stop"))
        assert reply.completion().logprobs == expected


def test_reply_raises_what_the_engine_reports():
    with pytest.raises(DecodeError, match="cannot decode"):
        ReplyBuilder(Letters(), SamplingParams(), seed=0).feed(event("", "error", error="cannot decode the batch"))


def test_stats_count_tokens_per_round_and_second():
    stats = RequestStats(n_rounds=4, n_committed=10, draft_ms=2.0, verify_ms=6.0, host_ms=2.0)
    assert (stats.accepted_length, stats.decode_ms, stats.tokens_per_second) == (2.5, 10.0, 1000.0)
    assert (RequestStats().accepted_length, RequestStats().tokens_per_second) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([], ValueError),
        ("hello", TypeError),
        ({"role": "user"}, TypeError),
        (["hello"], TypeError),
        ([{"content": "hello"}], ValueError),
        ([{"role": "user", "content": object()}], TypeError),
        ([{"role": "user", "content": "\ud800"}], ValueError),
    ],
)
def test_render_chat_refuses_what_is_no_conversation(llm, messages, error):
    with pytest.raises(error):
        render_chat(llm.model, messages)


def test_render_chat_applies_the_template_of_the_file(llm):
    prompt = render_chat(llm.model, [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Häh? 🙂"}])
    assert prompt.index("Be kind.") < prompt.index("Häh? 🙂")
    assert prompt != "Be kind.Häh? 🙂"
    one = llm.tokenize(prompt)
    assert any(llm.model.is_control(token) for token in one)  # the template's marks became special tokens


def test_render_chat_takes_another_template(llm):
    template = "{% for message in messages %}({{ message.role }}) {{ message.content }}{% endfor %}"
    assert render_chat(llm.model, [{"role": "user", "content": "hi"}], template=template).startswith("(user) hi")


def test_render_chat_needs_a_template():
    with pytest.raises(ValueError, match="the model has none"):
        render_chat(SimpleNamespace(chat_template=None), [{"role": "user", "content": "hi"}])


def test_second_bos_is_dropped():
    model = SimpleNamespace(adds_bos=True, bos_token=1)
    assert without_second_bos(model, [1, 1, 5]) == [1, 5]
    assert without_second_bos(model, [1, 5]) == [1, 5]
    assert without_second_bos(SimpleNamespace(adds_bos=False, bos_token=1), [1, 1]) == [1, 1]
