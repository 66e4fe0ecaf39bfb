"""Grammars under speculation on the bundled pair: what comes out obeys them, and drafts do not change it."""

from __future__ import annotations

import json
import re

import pytest
from dspark_cpp import LLM, SamplingParams, _core

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "count": {"type": "integer"},
        "kind": {"enum": ["cat", "dog"]},
    },
    "required": ["name", "count", "kind"],
}
GBNF = 'root ::= "{" [a-z]{3,8} ":" [0-9]{1,4} "}"'


@pytest.fixture(scope="module")
def grammar(llm: LLM) -> _core.Grammar:
    return _core.Grammar(llm.model, GBNF)


def run(llm: LLM, params: SamplingParams, grammar: _core.Grammar) -> tuple[str, _core.Event]:
    """Text of one request, and its last event."""
    import queue

    inbox: queue.Queue[_core.Event] = queue.Queue()
    prompt = llm.tokenize("<|im_start|>user\nTell me about cats.<|im_end|>\n<|im_start|>assistant\n")
    llm.submit(prompt, params, inbox.put, grammar=grammar)
    tokens: list[int] = []
    while True:
        event = inbox.get(timeout=300)
        tokens += event.tokens
        if event.finish_reason is not None:
            return llm.detokenize(tokens), event


@pytest.mark.parametrize(
    ("repeats", "message"),
    [
        ("{4,1}", "grammar must not repeat at least 4 and at most 1 times"),
        ("{ 4 , 0 }", "grammar must not repeat at least 4 and at most 0 times"),
        ("{2001}", "grammar must demand at most 2000 repetitions, got 2001"),
        ("{99999999999999999999,}", "grammar must demand at most 2000 repetitions, got 4294967295"),
        ("{0,2000} " + "[a]{0,2000} " * 10, "grammar must have bounds of repetitions that add up to 20000 at most"),
    ],
)
def test_endless_repetitions_never_reach_the_parser(llm, repeats, message):
    with pytest.raises(ValueError, match=message):
        _core.Grammar(llm.model, f"root ::= [b]{repeats}")


@pytest.mark.parametrize(
    "rule", ['"{4,1}"', '"\\"{4,1}"', "[{4,1}]", "[\\]{4,1}]", '"a" # {4,1}\n', "[a]{4,}", "[a]{0,9999}"]
)
def test_what_only_looks_like_one_does(llm, rule):
    _core.Grammar(llm.model, f"root ::= {rule}")


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "items": {}, "minItems": 5, "maxItems": 2},
        {"type": "string", "minLength": 5, "maxLength": 2},
        {"type": "string", "pattern": "^a{5,2}$"},
        {"type": "array", "minItems": 10**6},
    ],
)
def test_schemas_that_demand_it_are_refused(schema):
    with pytest.raises(ValueError, match=r"grammar must|JSON schema"):
        _core.json_schema_to_grammar(json.dumps(schema))


@pytest.mark.parametrize("item", ["[a-z]?", "[a-z]*", "[a-z]{0,3}", '("a" | "b")?', '("a"? "b"?)', '("" | "a")'])
def test_what_may_be_empty_is_not_repeated_often(llm, item):
    """Such grammars take seconds a token, and everyone in the engine waits."""
    for gbnf in (f'root ::= ({item}){{0,200}} "b"', f'root ::= x{{0,200}} "b"\nx ::= {item}'):
        with pytest.raises(ValueError, match="grammar must repeat what may be empty at most 10 times"):
            _core.Grammar(llm.model, gbnf)
    _core.Grammar(llm.model, f'root ::= ({item}){{0,8}} ({item})* ([a-z]){{0,2000}} ({item} ","){{0,200}} "b"')


def test_many_optional_properties_are_no_such_thing(llm):
    properties = {f"p{i}": {"type": "integer"} for i in range(300)}
    for schema in ({"type": "object", "properties": properties}, {"enum": [f"value {i}" for i in range(900)]}):
        grammar = _core.Grammar(llm.model, _core.json_schema_to_grammar(json.dumps(schema)))
        text, last = run(llm, SamplingParams(temperature=0, max_tokens=40), grammar)
        assert last.finish_reason in ("stop", "length")
        assert text


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_text_is_in_the_language_of_the_grammar(llm, grammar, temperature):
    for seed in range(5):
        text, last = run(llm, SamplingParams(temperature=temperature, seed=seed, max_tokens=60), grammar)
        assert last.finish_reason == "stop"
        assert re.fullmatch(r"\{[a-z]{3,8}:[0-9]{1,4}\}", text)


def test_drafts_do_not_change_the_text(llm, grammar):
    for temperature in (0.0, 0.9):
        texts = {
            run(llm, SamplingParams(temperature=temperature, seed=4, max_tokens=60, draft=draft), grammar)[0]
            for draft in ("off", 3, 7)
        }
        assert len(texts) == 1


def test_schema_gives_json_of_its_form(llm):
    grammar = _core.Grammar(llm.model, _core.json_schema_to_grammar(json.dumps(SCHEMA)))
    text, last = run(llm, SamplingParams(temperature=0.7, seed=1, max_tokens=400), grammar)
    assert last.finish_reason == "stop"
    found = json.loads(text)
    assert set(found) == {"name", "count", "kind"}
    assert isinstance(found["count"], int)
    assert found["kind"] in ("cat", "dog")


def test_allows_tells_beginnings_from_other_texts(llm, grammar):
    assert grammar.allows(llm.model, "{cats:12")
    assert grammar.allows(llm.model, "{cats:12}")
    assert not grammar.allows(llm.model, "{cats:12}x")
    assert not grammar.allows(llm.model, "{Cats")


def test_lazy_grammar_binds_from_its_trigger_on(llm):
    lazy = _core.Grammar(llm.model, 'root ::= "<a>" [0-9]+', is_lazy=True, trigger_words=["<a>"])
    assert lazy.allows(llm.model, "any text at all, however long. " * 20)
    assert lazy.allows(llm.model, "text <a>123")
    assert not lazy.allows(llm.model, "text <a>12x")


def test_prefill_goes_before(llm):
    grammar = _core.Grammar(llm.model, 'root ::= "<a>" [0-9]+', prefill="<a>")
    assert grammar.allows(llm.model, "123")
    assert not grammar.allows(llm.model, "<a>")
    with pytest.raises(ValueError, match="grammar must begin like the prompt's end"):
        _core.Grammar(llm.model, 'root ::= "<a>" [0-9]+', prefill="<b>")


def test_bad_grammar_is_refused(llm):
    with pytest.raises(ValueError, match="grammar must be a GBNF grammar with a rule `root`"):
        _core.Grammar(llm.model, "nonsense ::=")
    with pytest.raises(ValueError, match="cannot use the JSON schema"):
        _core.json_schema_to_grammar("[1")


def test_other_rules_are_refused(llm, grammar):
    with pytest.raises(ValueError, match="verification must be auto or exact with a grammar"):
        llm.submit([1], SamplingParams(verification="block"), print, grammar=grammar)
