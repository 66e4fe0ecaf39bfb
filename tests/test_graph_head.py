"""The sequential head as a ggml graph drafts what the candidate and the full head draft, and what the equations say."""

from __future__ import annotations

import os

import numpy as np
import pytest
from dspark_cpp._core import _graph_head, _math
from reference import heads as oracle

N_VOCAB, HIDDEN, RANK, N_SLOTS = 1200, 48, 32, 7
# The device under test; DSPARK_TEST_DEVICE=CUDA0 runs the same tests on a GPU.
DEVICE = os.environ.get("DSPARK_TEST_DEVICE", "")
# A GPU multiplies f32 matrices in tf32 (10 mantissa bits) where it may: sums of 32 terms about 2 are off by 0.009.
ON_CPU = DEVICE in ("", "CPU")
RTOL, ATOL = (1e-4, 1e-5) if ON_CPU else (2e-3, 1.5e-2)
TYPES = ["vanilla", "gated", "rnn"]


def make_weights(kind, *, seed=0, confidence=None, n_draft=None, softcap=0.0, dtype=np.float32):
    """Weights for `_math.draft_blocks`; rounding to `dtype` is done here, so every form reads the same numbers."""
    rng = np.random.default_rng(seed)

    def table(rows, cols, scale):
        return rng.normal(0, scale, (rows, cols)).astype(dtype).astype(np.float32)

    weights = {
        "type": kind,
        "n_vocab": N_VOCAB,
        "hidden_size": HIDDEN,
        "rank": RANK,
        "w1": table(N_VOCAB, RANK, 1.0),
        "w2": table(n_draft or N_VOCAB, RANK, 0.6),
        "gate": table(RANK, HIDDEN + RANK, 0.2),
        "gate_bias": rng.normal(0, 0.3, RANK).astype(np.float32),
        "joint": table(3 * RANK, 2 * RANK + HIDDEN, 0.2),
        "joint_bias": rng.normal(0, 0.3, 3 * RANK).astype(np.float32),
    }
    if n_draft:
        weights["d2t"] = rng.permutation(N_VOCAB)[:n_draft].tolist()  # neither ascending nor dense
    if softcap:
        weights["logit_softcap"] = softcap
    if confidence is not None:
        weights["confidence"] = rng.normal(0, 0.2, HIDDEN + (RANK if confidence == "markov" else 0)).astype(np.float32)
        weights["confidence_bias"] = 0.4
    return weights


def make_head(weights, type_name="f32", **options):
    """The same weights as `_graph_head.GraphHead` takes them: typed tables of bytes."""
    dtype = {"f32": np.float32, "f16": np.float16}[type_name]
    tables = {
        name: (type_name, weights[name].astype(dtype).tobytes(), *weights[name].shape)
        for name in ("w1", "w2", "gate", "joint")
    }
    return _graph_head.GraphHead({**weights, **tables}, device=DEVICE, **options)


def quantize(table):
    """Rows as q8_0 (blocks of an f16 scale and 32 int8), and the floats they stand for."""
    blocks = table.reshape(-1, 32)
    scale = (np.abs(blocks).max(axis=1, keepdims=True) / 127).astype(np.float16)
    steps = np.round(blocks / scale.astype(np.float32)).astype(np.int8)
    data = np.concatenate([scale.view(np.int8), steps], axis=1)
    return data.tobytes(), (scale.astype(np.float32) * steps).reshape(table.shape)


def make_requests(n, *, temperatures=(1.0,), seed=0, weights=None, n_slots=N_SLOTS):
    rng = np.random.default_rng(seed)
    requests = []
    for i in range(n):
        base = rng.normal(0, 3.0, (n_slots, N_VOCAB)).astype(np.float32)
        if weights is not None and "d2t" in weights:
            base[:, np.setdiff1d(np.arange(N_VOCAB), weights["d2t"])] = -np.inf
        requests.append(
            {
                "base_logits": base,
                "hidden": rng.normal(0, 1.0, (n_slots, HIDDEN)).astype(np.float32),
                "anchor": int(rng.integers(N_VOCAB)),
                "start": 100 + 13 * i,
                "temperature": temperatures[i % len(temperatures)],
                "seed": 1000 * seed + i,
            }
        )
    return requests


def assert_same_drafts(weights, requests, drafts, n_candidates, rtol=RTOL, atol=ATOL):
    """Tokens, p^d, logits and confidences equal those of the C++ head with `n_candidates` (0: the full head)."""
    for (tokens, probs, confidence, logits), other in zip(
        drafts, _math.draft_blocks(weights, n_candidates, requests), strict=True
    ):
        n = count_same_inputs(tokens, other, atol)
        np.testing.assert_allclose(confidence[:n], other["confidence_logits"][:n], rtol=1e-6)
        for (ids, values), trace in zip(logits[:n], other["trace"][:n], strict=True):
            order = np.argsort(trace["ids"])
            np.testing.assert_array_equal(ids, trace["ids"][order])
            expected = (trace["base_logits"] + trace["transition_bias"])[order]
            np.testing.assert_allclose(values, expected, rtol=rtol, atol=atol)
        for (ids, p), (other_ids, other_p) in zip(probs[:n], other["probs"][:n], strict=True):
            np.testing.assert_array_equal(ids, other_ids)
            # A logit's absolute error is the probability's relative one, over T (at least 0.3 here).
            np.testing.assert_allclose(p, other_p, rtol=(rtol * 30 + atol) / 0.3, atol=1e-7)


def count_same_inputs(tokens, other, atol):
    """Slots up to the first one drawn otherwise: none, but for a uniform on a boundary that a GPU's rounding moved."""
    [differing] = np.nonzero(np.asarray(tokens) != other["tokens"])
    if ON_CPU or len(differing) == 0:
        np.testing.assert_array_equal(tokens, other["tokens"])
        return len(tokens)
    slot = differing[0]
    low, high = sorted((tokens[slot], other["tokens"][slot]))
    ids, p = other["probs"][slot]
    assert p[(ids > low) & (ids < high)].sum() < 2 * atol  # both lie at the boundary
    return slot + 1


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("n_candidates", [1, 16, 64, 0, 2 * N_VOCAB], ids=str)
@pytest.mark.parametrize("n_requests", [1, 3, 8])
def test_greedy_equals_the_other_heads(kind, n_candidates, n_requests):
    weights = make_weights(kind)
    requests = make_requests(n_requests, temperatures=(0.0,))
    drafts = make_head(weights, n_candidates=n_candidates, max_requests=8).draft_blocks(requests)
    assert_same_drafts(weights, requests, drafts, 0 if n_candidates > N_VOCAB else n_candidates)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("n_candidates", [64, 0])
def test_mixed_temperatures_equal_the_other_heads(kind, n_candidates):
    weights = make_weights(kind, seed=1)
    head = make_head(weights, n_candidates=n_candidates, max_requests=8)
    for seed in range(6):  # 8 * 7 draws each; none of these uniforms lies within rounding of a boundary
        requests = make_requests(1 + seed, temperatures=(1.0, 0.0, 0.5, 2.0, 0.3), seed=seed)
        assert_same_drafts(weights, requests, head.draft_blocks(requests), n_candidates)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("confidence", ["hidden", "markov"])
def test_confidence_equals_the_other_heads(kind, confidence):
    weights = make_weights(kind, seed=2, confidence=confidence)
    requests = make_requests(2, temperatures=(0.0, 1.0), seed=2)
    drafts = make_head(weights, n_candidates=32, max_requests=2).draft_blocks(requests)
    assert len(drafts[0][2]) == N_SLOTS
    assert_same_drafts(weights, requests, drafts, 32)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("n_candidates", [32, 0])
def test_draft_vocabulary_map_equals_the_other_heads(kind, n_candidates):
    weights = make_weights(kind, seed=3, n_draft=700)
    requests = make_requests(3, temperatures=(1.0, 0.0), seed=3, weights=weights)
    drafts = make_head(weights, n_candidates=n_candidates, max_requests=4).draft_blocks(requests)
    assert_same_drafts(weights, requests, drafts, n_candidates)
    assert {int(t) for tokens, *_ in drafts for t in tokens} <= set(weights["d2t"])


@pytest.mark.parametrize("n_candidates", [48, 0])
def test_soft_cap_is_applied_before_the_bias(n_candidates):
    weights = make_weights("gated", seed=4, softcap=5.0)
    requests = make_requests(2, temperatures=(0.0, 1.0), seed=4)
    drafts = make_head(weights, n_candidates=n_candidates, max_requests=2).draft_blocks(requests)
    assert_same_drafts(weights, requests, drafts, n_candidates)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("n_candidates", [64, 0])
def test_f16_weights_equal_the_other_heads(kind, n_candidates):
    weights = make_weights(kind, seed=5, dtype=np.float16)
    requests = make_requests(4, temperatures=(0.0, 1.0), seed=5)
    drafts = make_head(weights, "f16", n_candidates=n_candidates, max_requests=4).draft_blocks(requests)
    # Rows of f16 are widened exactly; a whole f16 W2 meets a state rounded to f16: 5e-4 of |W2| |q|, here about 4.
    tolerance = {} if n_candidates else {"rtol": 5e-4, "atol": 1e-2}
    assert_same_drafts(weights, requests, drafts, n_candidates, **tolerance)


@pytest.mark.parametrize("n_candidates", [64, 0])
def test_quantized_tables_stay_as_they_are(n_candidates):
    weights = make_weights("rnn", seed=13)
    tables = {k: ("f32", weights[k].tobytes(), *weights[k].shape) for k in ("gate", "joint")}
    for name in ("w1", "w2"):
        data, weights[name] = quantize(weights[name])
        tables[name] = ("q8_0", data, N_VOCAB, RANK)
    head = _graph_head.GraphHead({**weights, **tables}, device=DEVICE, n_candidates=n_candidates, max_requests=4)
    requests = make_requests(3, temperatures=(0.0, 1.0), seed=13)
    # Rows of q8_0 are widened exactly; a whole q8_0 W2 meets a state in q8_0 (8 bits): 0.4 % of |W2| |q|, here about 4.
    if n_candidates:
        assert_same_drafts(weights, requests, head.draft_blocks(requests), n_candidates)
    else:
        drafts = zip(head.draft_blocks(requests), _math.draft_blocks(weights, 0, requests), strict=True)
        for (_, _, _, logits), other in drafts:
            trace = other["trace"][0]
            np.testing.assert_allclose(logits[0][1], trace["base_logits"] + trace["transition_bias"], atol=0.1)


@pytest.mark.parametrize("kind", TYPES)
def test_bf16_tables_stay_as_they_are(kind):
    weights = make_weights(kind, seed=14)
    tables = {k: ("f32", weights[k].tobytes(), *weights[k].shape) for k in ("gate", "joint")}
    for name in ("w1", "w2"):
        bits = (weights[name].view(np.uint32) >> 16).astype(np.uint16)
        weights[name] = (bits.astype(np.uint32) << 16).view(np.float32)
        tables[name] = ("bf16", bits.tobytes(), N_VOCAB, RANK)
    head = _graph_head.GraphHead({**weights, **tables}, device=DEVICE, n_candidates=64, max_requests=4)
    requests = make_requests(3, temperatures=(0.0, 1.0), seed=14)
    assert_same_drafts(weights, requests, head.draft_blocks(requests), 64)


@pytest.mark.parametrize("kind", TYPES)
def test_block_equals_the_equations(kind):
    weights = make_weights(kind, seed=6, confidence="markov")
    requests = make_requests(2, temperatures=(0.0, 0.8), seed=6)
    drafts = make_head(weights, n_candidates=40, max_requests=2).draft_blocks(requests)
    for request, (tokens, probs, confidence, _) in zip(requests, drafts, strict=True):
        start = request["start"]
        slots = oracle.draft_block(
            weights,
            request,
            40,
            lambda slot, r=request, s=start: _math.uniform(r["seed"], "draft_sample", s + 1 + slot, s),
        )
        assert tokens.tolist() == [slot.token for slot in slots]
        np.testing.assert_allclose(confidence, [slot.confidence_logit for slot in slots], rtol=1e-4, atol=1e-5)
        for (ids, p), slot in zip(probs, slots, strict=True):
            # float32 logits of size 10 err by about 1e-5, which is the probability's relative error.
            np.testing.assert_allclose(p, slot.probs[ids], rtol=10 * RTOL, atol=1e-7)


def test_selected_candidates_equal_selecting_here():
    weights = make_weights("vanilla", seed=7)
    requests = make_requests(2, temperatures=(0.0, 1.0), seed=7)
    head = make_head(weights, n_candidates=24, max_requests=2)
    selected = []
    for request in requests:
        slots = [_math.select_top_k(row, 24) for row in request["base_logits"]]
        selected.append({k: v for k, v in request.items() if k != "base_logits"} | {"candidates": slots})
    for (tokens, probs, *_), (other_tokens, other_probs, *_) in zip(
        head.draft_blocks(requests), head.draft_blocks(selected), strict=True
    ):
        np.testing.assert_array_equal(tokens, other_tokens)
        np.testing.assert_array_equal(probs[3][1], other_probs[3][1])


@pytest.mark.parametrize("n_candidates", [16, 0])
def test_fewer_finite_logits_than_candidates(n_candidates):
    weights = make_weights("vanilla", seed=8)
    requests = make_requests(2, temperatures=(0.0, 1.0), seed=8)
    for request in requests:
        request["base_logits"][:, 5:] = -np.inf
        request["base_logits"][2, :4] = -np.inf  # a single token left
    for tokens, probs, _, logits in make_head(weights, n_candidates=n_candidates, max_requests=2).draft_blocks(
        requests
    ):
        assert tokens.max() < 5
        assert tokens[2] == 4
        assert all(p[np.searchsorted(ids, t)] > 0 for (ids, p), t in zip(probs, tokens, strict=True))
        assert len(logits[0][0]) == (5 if n_candidates else N_VOCAB)


def test_batches_over_max_requests_and_blocks_of_unequal_length():
    weights = make_weights("rnn", seed=9)
    requests = [
        make_requests(1, temperatures=(t,), seed=9 + i, n_slots=n)[0]
        for i, (t, n) in enumerate([(0.0, 7), (1.0, 3), (0.7, 5), (1.0, 1), (0.0, 6), (1.0, 7), (1.0, 2)])
    ]
    together = make_head(weights, n_candidates=64, max_requests=3).draft_blocks(requests)
    assert [len(tokens) for tokens, *_ in together] == [7, 3, 5, 1, 6, 7, 2]
    assert_same_drafts(weights, requests, together, 64)


def test_equal_maxima_go_to_the_lowest_id():
    weights = make_weights("vanilla", seed=10)
    weights["w2"][:] = 0.0
    request = make_requests(1, temperatures=(0.0,), seed=10)[0]
    request["base_logits"][:, [900, 30, 400]] = 50.0
    for n_candidates in (8, 0):
        tokens, *_ = make_head(weights, n_candidates=n_candidates).draft_blocks([request])[0]
        assert tokens.tolist() == [30] * N_SLOTS


def test_threads_and_reuse_do_not_change_drafts():
    weights = make_weights("rnn", seed=11)
    one, two = make_head(weights, max_requests=4), make_head(weights, max_requests=4, n_threads=2)
    for n in (4, 1, 4, 2, 3):
        requests = make_requests(n, temperatures=(1.0, 0.0), seed=n)
        for (tokens, *_), (other, *_) in zip(one.draft_blocks(requests), two.draft_blocks(requests), strict=True):
            np.testing.assert_array_equal(tokens, other)


@pytest.mark.parametrize("n_candidates", [12, 0])
def test_drafted_tokens_fit_their_distribution(n_candidates):
    """Chi-square of slot 1 against its p^d, rounds grouped by the token of slot 0, which p^d of slot 1 depends on."""
    weights = make_weights("vanilla", seed=12)
    request = make_requests(1, temperatures=(4.0,), seed=12, n_slots=2)[0]  # flat, so that many cells fill up
    request["base_logits"][:, 12:] = -90.0  # 12 tokens share nearly all mass, in either form
    head = make_head(weights, n_candidates=n_candidates, max_requests=64)
    counts, expected = {}, {}
    for batch in range(160):
        requests = [{**request, "start": 64 * batch + i} for i in range(64)]
        for tokens, probs, *_ in head.draft_blocks(requests):
            first = int(tokens[0])
            counts.setdefault(first, np.zeros(13))[min(int(tokens[1]), 12)] += 1
            expected.setdefault(first, np.append(probs[1][1][:12], max(1.0 - probs[1][1][:12].sum(), 0.0)))
    statistic, freedom = 0.0, 0
    for first, seen in counts.items():
        wanted = expected[first] * seen.sum()
        is_large = wanted >= 5
        if is_large.sum() < 2:
            continue
        seen = np.append(seen[is_large], seen[~is_large].sum())
        wanted = np.append(wanted[is_large], wanted[~is_large].sum())
        keep = wanted > 1
        statistic += float((((seen - wanted) ** 2)[keep] / wanted[keep]).sum())
        freedom += int(keep.sum()) - 1
    assert freedom > 10
    # Fixed seeds, so this is no gamble: 4 standard deviations would be one failure in some 10,000 seeds.
    assert abs(statistic - freedom) < 4 * np.sqrt(2 * freedom)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_threads": 0}, "n_threads must be at least 1, got 0"),
        ({"max_requests": 0}, "max_requests must be at least 1, got 0"),
        ({"n_candidates": -1}, "n_candidates must be at least 0, got -1"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make_head(make_weights("vanilla"), **options)


def test_unknown_device_lists_the_known_ones():
    weights = make_weights("vanilla")
    tables = {k: ("f32", weights[k].tobytes(), *weights[k].shape) for k in ("w1", "w2", "gate", "joint")}
    with pytest.raises(ValueError, match=r"device must be one of .*CPU.*, got CUDA99"):
        _graph_head.GraphHead({**weights, **tables}, device="CUDA99")


def test_bad_tables_are_named():
    weights = make_weights("vanilla")
    with pytest.raises(ValueError, match="f32 data must hold 4 rows of 3, got 8 bytes"):
        _graph_head.GraphHead({**weights, "w1": ("f32", b"12345678", 4, 3)})
    with pytest.raises(ValueError, match="type_name must be a type of ggml that can be decoded, got f33"):
        _graph_head.GraphHead({**weights, "w1": ("f33", b"", 0, 0)})


@pytest.mark.parametrize("n_candidates", [8, 0])
def test_bad_logits_raise(n_candidates):
    head = make_head(make_weights("gated"), n_candidates=n_candidates)
    for value, message in ((np.nan, "NaN"), (np.inf, "inf")):
        request = make_requests(1)[0]
        request["base_logits"][2, 7] = value
        with pytest.raises(RuntimeError, match=message):
            head.draft_blocks([request])
    request = make_requests(1)[0]
    request["base_logits"][2] = -np.inf
    with pytest.raises(RuntimeError, match="finite"):
        head.draft_blocks([request])
    request = make_requests(1)[0]
    request["hidden"][3] = np.nan
    with pytest.raises(RuntimeError, match="NaN"):
        head.draft_blocks([request])
    head.draft_blocks(make_requests(1))  # and the head still works


def test_bad_inputs_raise():
    head = make_head(make_weights("vanilla"), n_candidates=8)
    for change, message in (
        ({"anchor": N_VOCAB}, "anchor must be a token below"),
        ({"base_logits": np.zeros((2, N_VOCAB), np.float32)}, "must have a row per slot"),
        ({"candidates": [([N_VOCAB], [0.0])] * N_SLOTS}, "candidates must hold at most 8 known tokens"),
        ({"candidates": [(list(range(9)), [0.0] * 9)] * N_SLOTS}, "candidates must hold at most 8 known tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            head.draft_blocks([{**make_requests(1)[0], **change}])
