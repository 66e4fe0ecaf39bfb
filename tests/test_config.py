"""config: defaults, what is accepted, and the message for everything that is not."""

from __future__ import annotations

import dataclasses
import math

import pytest
from dspark_cpp.config import EngineConfig, EngineOptions, SamplingParams

RANGES = [
    ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
    ({"max_tokens": 2**31}, "max_tokens must be at most 2147483647, got 2147483648"),
    ({"temperature": -0.1}, "temperature must be at least 0, got -0.1"),
    ({"temperature": math.nan}, "temperature must be finite, got nan"),
    ({"temperature": math.inf}, "temperature must be finite, got inf"),
    ({"temperature": 1e300}, "temperature must be at most 1e+30, got 1e+300"),
    ({"temperature": 10**400}, "temperature must be finite, got 1000"),
    ({"top_k": -1}, "top_k must be at least 0, got -1"),
    ({"top_p": 0.0}, "top_p must be above 0, got 0.0"),
    ({"top_p": 1.5}, "top_p must be at most 1, got 1.5"),
    ({"top_p": math.nan}, "top_p must be finite, got nan"),
    ({"min_p": -0.5}, "min_p must be at least 0, got -0.5"),
    ({"min_p": 1.01}, "min_p must be at most 1, got 1.01"),
    ({"repetition_penalty": 0}, "repetition_penalty must be above 0, got 0"),
    ({"presence_penalty": 3}, "presence_penalty must be at most 2, got 3"),
    ({"frequency_penalty": -3}, "frequency_penalty must be at least -2, got -3"),
    ({"penalty_window": -2}, "penalty_window must be at least -1, got -2"),
    ({"logit_bias": {-1: 1.0}}, "logit_bias token must be at least 0, got -1"),
    ({"logit_bias": {1: math.inf}}, "logit_bias value must be finite, got inf"),
    ({"seed": -1}, "seed must be at least 0, got -1"),
    ({"seed": 2**64}, "seed must be at most 18446744073709551615, got 18446744073709551616"),
    ({"stop": ""}, "stop must hold strings of at least one character, got ''"),
    ({"stop": ["a", ""]}, "stop must hold strings of at least one character, got ''"),
    ({"logprobs": -1}, "logprobs must be at least 0, got -1"),
    ({"logprobs": 1001}, "logprobs must be at most 1000, got 1001"),
    ({"verification": "fast"}, "verification must be one of auto, exact, rejection, block, got 'fast'"),
    ({"draft": "full"}, "draft must be one of auto, off or a number of tokens, got 'full'"),
    ({"draft": -1}, "draft must be at least 0, got -1"),
]

TYPES = [
    ({"max_tokens": 1.5}, "max_tokens must be an integer, got 1.5"),
    ({"max_tokens": True}, "max_tokens must be an integer, got True"),
    ({"max_tokens": "8"}, "max_tokens must be an integer, got '8'"),
    ({"temperature": "hot"}, "temperature must be a number, got 'hot'"),
    ({"temperature": True}, "temperature must be a number, got True"),
    ({"temperature": None}, "temperature must be a number, got None"),
    ({"top_k": 2.0}, "top_k must be an integer, got 2.0"),
    ({"logit_bias": [1, 2]}, r"logit_bias must map token ids to numbers, got \[1, 2\]"),
    ({"logit_bias": {"a": 1.0}}, "logit_bias token must be an integer, got 'a'"),
    ({"seed": 1.0}, "seed must be an integer, got 1.0"),
    ({"stop": 3}, "stop must be a string or a sequence of strings, got 3"),
    ({"stop": b"x"}, "stop must be a string or a sequence of strings, got b'x'"),
    ({"stop": [1]}, "stop must hold strings, got 1"),
    ({"ignore_eos": 1}, "ignore_eos must be True or False, got 1"),
    ({"logprobs": True}, "logprobs must be an integer, got True"),
    ({"verification": 1}, "verification must be a string, got 1"),
    ({"draft": False}, "draft must be an integer, got False"),
    ({"draft": 1.5}, "draft must be an integer, got 1.5"),
    ({"temprature": 1}, "unexpected keyword argument 'temprature'"),
]

ENGINE_RANGES = [
    ({"n_ctx": -1}, "n_ctx must be at least 0, got -1"),
    ({"n_ctx": 2**40}, "n_ctx must be at most 16777216, got 1099511627776"),
    ({"n_parallel": 257}, "n_parallel must be at most 256, got 257"),
    ({"n_threads": 513}, "n_threads must be at most 512, got 513"),
    ({"n_batch": 16385}, "n_batch must be at most 16384, got 16385"),
    ({"n_parallel": 0}, "n_parallel must be at least 1, got 0"),
    ({"n_gpu_layers": -2}, "n_gpu_layers must be at least -1, got -2"),
    ({"n_threads": -1}, "n_threads must be at least 0, got -1"),
    ({"n_batch": 0}, "n_batch must be at least 1, got 0"),
    ({"n_candidates": 0}, "n_candidates must be at least 1, got 0"),
    ({"draft_window": 0}, "draft_window must be at least 1, got 0"),
    ({"max_queue": 0}, "max_queue must be at least 1, got 0"),
    ({"prefill_chunk": 0}, "prefill_chunk must be at least 1, got 0"),
    ({"kv_type": "f8"}, "kv_type must be one of .*, got 'f8'"),
    ({"head": "fast"}, "head must be one of candidates, full, graph, got 'fast'"),
    ({"policy": "always"}, "policy must be off, full, fixed:n, .* or a number of tokens, got 'always'"),
    ({"policy": "fixed:"}, "policy must be .*, got 'fixed:'"),
    ({"policy": "fixed:-1"}, "policy must be .*, got 'fixed:-1'"),
    ({"policy": "threshold:x"}, "policy must be .*, got 'threshold:x'"),
    ({"policy": "threshold:1.5"}, "policy threshold must be at most 1, got 1.5"),
    ({"policy": "threshold:nan"}, "policy threshold must be finite"),
    ({"objective": "speed"}, "objective must be one of throughput, latency, got 'speed'"),
    ({"costs": "never"}, "costs must be one of auto, measure, none, got 'never'"),
    ({"policy": -1}, "policy must be at least 0, got -1"),
]

ENGINE_TYPES = [
    ({"n_ctx": "512"}, "n_ctx must be an integer, got '512'"),
    ({"n_parallel": True}, "n_parallel must be an integer, got True"),
    ({"use_mmap": 1}, "use_mmap must be True or False, got 1"),
    ({"head": None}, "head must be a string, got None"),
    ({"policy": 0.5}, "policy must be an integer, got 0.5"),
    ({"n_contxt": 1}, "unexpected keyword argument 'n_contxt'"),
]


@pytest.mark.parametrize(("options", "message"), RANGES)
def test_sampling_params_name_the_rule_a_value_breaks(options, message):
    with pytest.raises(ValueError, match=f"^{message.replace('+', '[+]')}"):
        SamplingParams(**options)


@pytest.mark.parametrize(("options", "message"), TYPES)
def test_sampling_params_refuse_wrong_types(options, message):
    with pytest.raises(TypeError, match=message):
        SamplingParams(**options)


@pytest.mark.parametrize(("options", "message"), ENGINE_RANGES)
def test_engine_config_names_the_rule_a_value_breaks(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        EngineConfig(**options)


@pytest.mark.parametrize(("options", "message"), ENGINE_TYPES)
def test_engine_config_refuses_wrong_types(options, message):
    with pytest.raises(TypeError, match=message):
        EngineConfig(**options)


def test_options_are_keyword_only_and_frozen():
    with pytest.raises(TypeError):
        SamplingParams(8)  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().max_tokens = 5  # type: ignore[misc]


def test_numbers_of_other_libraries_become_plain_ones():
    np = pytest.importorskip("numpy")
    params = SamplingParams(max_tokens=np.int64(5), temperature=np.float32(0.5), logit_bias={np.int32(3): 1})
    assert (type(params.max_tokens), type(params.temperature)) == (int, float)
    assert params.logit_bias == {3: 1.0}


def test_logit_bias_is_the_callers_no_longer():
    biases = {1: 1.0}
    params = SamplingParams(logit_bias=biases)
    biases[2] = 5.0
    assert params.logit_bias == {1: 1.0}


@pytest.mark.parametrize(("stop", "strings"), [((), ()), ("ab", ("ab",)), (["a", "b"], ("a", "b"))])
def test_stop_becomes_a_tuple(stop, strings):
    assert SamplingParams(stop=stop).stop_strings == strings


@pytest.mark.parametrize(("draft", "limit"), [("auto", -1), ("off", 0), (0, 0), (3, 3)])
def test_draft_as_the_engine_takes_it(draft, limit):
    assert SamplingParams(draft=draft).draft_limit == limit


@pytest.mark.parametrize(
    ("policy", "taken"),
    [
        ("auto", "adaptive"),
        ("adaptive", "adaptive"),
        ("full", "full"),
        ("off", "off"),
        (0, "off"),
        (4, "fixed:4"),
        ("fixed:4", "fixed:4"),
        ("fixed:0", "off"),
        ("threshold:0.25", "threshold:0.25"),
        ("algorithm1", "algorithm1"),
    ],
)
def test_policy_as_the_engine_takes_it(policy, taken):
    assert EngineConfig(policy=policy).policy == taken
    assert SamplingParams(policy=policy).policy == taken


def test_keywords_of_llm_are_those_of_the_config():
    assert set(EngineOptions.__annotations__) == {field.name for field in dataclasses.fields(EngineConfig)}


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({}, "block"),
        ({"temperature": 0}, "exact"),
        ({"seed": 1}, "exact"),
        ({"seed": 1, "verification": "block"}, "block"),
        ({"temperature": 0, "verification": "rejection"}, "rejection"),
    ],
)
def test_rule_of_verification(options, rule):
    assert SamplingParams(**options).rule == rule
