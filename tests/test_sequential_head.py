"""The sequential head (full and candidates) and the confidence head against the float64 oracle."""

from __future__ import annotations

import numpy as np
import pytest
from dspark_cpp._core import _math
from reference import acceptance as acceptance_oracle
from reference import heads as oracle

N_VOCAB, HIDDEN, RANK, N_SLOTS = 500, 48, 20, 7
HEADS = ["none", "vanilla", "gated", "rnn"]
MARKOV_HEADS = HEADS[1:]
FORMS = {"full": 0, "candidates": 64, "few candidates": 5}
# float32 dot products of up to 100 terms of size about 1 against float64: errors of a few 1e-6.
ATOL = 2e-5


def make_weights(head, rng, **extra):
    n_rows = len(extra.get("d2t", range(N_VOCAB)))
    weights = {"type": head, "n_vocab": N_VOCAB, "hidden_size": HIDDEN, "rank": RANK, **extra}
    shapes = {
        "w1": (N_VOCAB, RANK),
        "w2": (n_rows, RANK),
        "gate": (RANK, HIDDEN + RANK),
        "joint": (3 * RANK, 2 * RANK + HIDDEN),
    }
    needed = {"none": (), "vanilla": ("w1", "w2"), "gated": ("w1", "w2", "gate"), "rnn": ("w1", "w2", "joint")}[head]
    for name in needed:
        scale = 1.0 if name in ("w1", "w2") else 0.3
        weights[name] = rng.normal(0, scale, shapes[name]).astype(np.float32)
    weights["gate_bias"] = rng.normal(size=RANK).tolist() if head == "gated" else []
    weights["joint_bias"] = rng.normal(size=3 * RANK).tolist() if head == "rnn" else []
    return weights


def make_request(rng, **extra):
    return {
        "base_logits": rng.normal(0, 3, (N_SLOTS, N_VOCAB)).astype(np.float32),
        "hidden": rng.normal(size=(N_SLOTS, HIDDEN)).astype(np.float32),
        "anchor": int(rng.integers(N_VOCAB)),
        "start": int(rng.integers(10_000)),
        "seed": int(rng.integers(2**63)),
        **extra,
    }


def expected_block(weights, request, n_candidates):
    if weights["type"] == "none":  # B = 0: the same equations with weights of zero
        zeros = {
            "type": "vanilla",
            "w1": np.zeros((N_VOCAB, RANK)),
            "w2": np.zeros((len(weights.get("d2t", range(N_VOCAB))), RANK)),
        }
        weights = {**weights, **zeros}

    def uniform(slot):
        return _math.uniform(request["seed"], "draft_sample", request["start"] + 1 + slot, request["start"])

    return oracle.draft_block(weights, request, n_candidates, uniform)


def check_block(draft, expected, weights):
    to_row = {int(t): i for i, t in enumerate(weights.get("d2t", range(N_VOCAB)))}
    assert draft["tokens"].tolist() == [slot.token for slot in expected]
    for (ids, probs), trace, slot in zip(draft["probs"], draft["trace"], expected, strict=True):
        dense = np.zeros(N_VOCAB)
        dense[ids] = probs
        np.testing.assert_allclose(dense, slot.probs, atol=ATOL)
        rows = [to_row[int(token)] for token in trace["ids"]]
        np.testing.assert_allclose(trace["transition_bias"], slot.transition_bias[rows], atol=ATOL)
        if weights["type"] != "none":
            np.testing.assert_allclose(trace["embedding"], slot.embedding, atol=ATOL)
            np.testing.assert_allclose(trace["state"], slot.state, atol=ATOL)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {}, {"temperature": 0.7, "top_k": 20, "top_p": 0.9}, {"min_p": 0.1}], ids=str
)
def test_heads_equal_oracle(head, form, options):
    rng = np.random.default_rng(1)
    weights = make_weights(head, rng)
    requests = [make_request(rng, **options) for _ in range(4)]
    drafts = _math.draft_blocks(weights, FORMS[form], requests)
    for request, draft in zip(requests, drafts, strict=True):
        check_block(draft, expected_block(weights, request, FORMS[form]), weights)


@pytest.mark.parametrize("has_map", [False, True])
@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 0.8}], ids=str)
def test_followers_join_the_candidates_of_a_vanilla_head(options, has_map):
    """Five of U and three of B: the union, and p^d restricted to it."""
    rng = np.random.default_rng(11)
    d2t = {"d2t": rng.permutation(N_VOCAB)[:300].tolist()} if has_map else {}
    weights = make_weights("vanilla", rng, **d2t)
    requests = [make_request(rng, **options) for _ in range(6)]
    if has_map:
        for request in requests:
            request["base_logits"][:, np.setdiff1d(np.arange(N_VOCAB), d2t["d2t"])] = -np.inf
    drafts = _math.draft_blocks(weights, 5, requests, 3)
    sizes = set()
    for request, draft in zip(requests, drafts, strict=True):

        def uniform(slot, request=request):
            return _math.uniform(request["seed"], "draft_sample", request["start"] + 1 + slot, request["start"])

        check_block(draft, oracle.draft_block(weights, request, 5, uniform, n_followers=3), weights)
        sizes |= {len(trace["ids"]) for trace in draft["trace"]}
        assert all(len(set(trace["ids"].tolist())) == len(trace["ids"]) for trace in draft["trace"])
    assert sizes <= {5, 6, 7, 8}
    assert max(sizes) == 8


def test_followers_of_other_heads_are_not_known_beforehand():
    rng = np.random.default_rng(12)
    for head in ("none", "gated", "rnn"):
        weights, request = make_weights(head, rng), make_request(rng)
        with_followers, without = (_math.draft_blocks(weights, 9, [request], n)[0] for n in (3, 0))
        assert with_followers["tokens"].tolist() == without["tokens"].tolist()
        assert all(len(trace["ids"]) == 9 for trace in with_followers["trace"])


@pytest.mark.parametrize("head", MARKOV_HEADS)
def test_a_batch_equals_its_requests_alone(head):
    """Bit for bit, with ragged slots: a request must not feel its neighbours."""
    rng = np.random.default_rng(2)
    weights = make_weights(head, rng)
    requests = [make_request(rng) for _ in range(5)]
    for n_slots, request in enumerate(requests):
        request["base_logits"] = request["base_logits"][:n_slots]
        request["hidden"] = request["hidden"][:n_slots]
    together = _math.draft_blocks(weights, 64, requests)
    for request, draft in zip(requests, together, strict=True):
        alone = _math.draft_blocks(weights, 64, [request])[0]
        assert alone["tokens"].tolist() == draft["tokens"].tolist()
        for (ids, probs), (ids_alone, probs_alone) in zip(draft["probs"], alone["probs"], strict=True):
            assert ids.tolist() == ids_alone.tolist()
            assert probs.tolist() == probs_alone.tolist()


@pytest.mark.parametrize("head", MARKOV_HEADS)
def test_fewer_slots_draft_a_prefix_of_the_block(head):
    rng = np.random.default_rng(3)
    weights, request = make_weights(head, rng), make_request(rng)
    whole = _math.draft_blocks(weights, 64, [request])[0]
    short = {**request, "base_logits": request["base_logits"][:3], "hidden": request["hidden"][:3]}
    assert _math.draft_blocks(weights, 64, [short])[0]["tokens"].tolist() == whole["tokens"][:3].tolist()


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 1.2}], ids=str)
def test_all_candidates_equal_the_full_head(head, options):
    rng = np.random.default_rng(4)
    weights, request = make_weights(head, rng), make_request(rng, **options)
    full = _math.draft_blocks(weights, 0, [request])[0]
    candidates = _math.draft_blocks(weights, N_VOCAB, [request])[0]
    assert full["tokens"].tolist() == candidates["tokens"].tolist()
    for (ids, probs), (ids_c, probs_c) in zip(full["probs"], candidates["probs"], strict=True):
        assert ids.tolist() == ids_c.tolist()
        # The full head rounds (logit - max) / T to float32: 6e-8 of up to 60 nats, as a relative error of the exp.
        np.testing.assert_allclose(probs, probs_c, rtol=5e-6)


@pytest.mark.parametrize("head", MARKOV_HEADS)
def test_candidates_selected_elsewhere_give_the_same_block(head):
    rng = np.random.default_rng(5)
    weights, request = make_weights(head, rng, logit_softcap=8.0), make_request(rng)
    selected = []
    for row in request["base_logits"]:
        ids, logits = _math.select_top_k(row, 64)
        order = rng.permutation(len(ids))
        selected.append((ids[order].tolist(), logits[order].tolist()))
    given = {key: value for key, value in request.items() if key != "base_logits"} | {"candidates": selected}
    mine = _math.draft_blocks(weights, 64, [request])[0]
    theirs = _math.draft_blocks(weights, 64, [given])[0]
    assert mine["tokens"].tolist() == theirs["tokens"].tolist()
    for (ids, probs), (ids_t, probs_t) in zip(mine["probs"], theirs["probs"], strict=True):
        assert ids.tolist() == ids_t.tolist()
        np.testing.assert_allclose(probs, probs_t, rtol=1e-6)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("form", FORMS)
def test_a_reduced_draft_vocabulary_drafts_target_ids(head, form):
    rng = np.random.default_rng(6)
    d2t = rng.permutation(N_VOCAB)[:120]
    weights = make_weights(head, rng, d2t=d2t.tolist())
    requests = [make_request(rng, temperature=temperature) for temperature in (0.0, 1.0)]
    for request in requests:
        outside = np.setdiff1d(np.arange(N_VOCAB), d2t)
        request["base_logits"][:, outside] = -np.inf
    for request, draft in zip(requests, _math.draft_blocks(weights, FORMS[form], requests), strict=True):
        assert set(draft["tokens"].tolist()) <= set(d2t.tolist())
        check_block(draft, expected_block(weights, request, FORMS[form]), weights)


@pytest.mark.parametrize("form", FORMS)
def test_softcap_applies_to_base_logits_only(form):
    rng = np.random.default_rng(7)
    weights, request = make_weights("vanilla", rng, logit_softcap=4.0), make_request(rng)
    draft = _math.draft_blocks(weights, FORMS[form], [request])[0]
    check_block(draft, expected_block(weights, request, FORMS[form]), weights)
    for slot, trace in enumerate(draft["trace"]):
        capped = 4 * np.tanh(request["base_logits"][slot][trace["ids"]] / 4)
        np.testing.assert_allclose(trace["base_logits"], capped, atol=1e-6)  # one tanh in float32
    assert np.abs(draft["trace"][0]["transition_bias"]).max() > 4


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_drafts_follow_bias_and_penalties_on_request(form, temperature):
    rng = np.random.default_rng(8)
    weights = make_weights("vanilla", rng)
    options = {"temperature": temperature, "presence_penalty": 2.0, "frequency_penalty": 2.0, "logit_bias": [(7, 2.0)]}
    requests = [make_request(rng, output=rng.integers(N_VOCAB, size=60).tolist(), **options) for _ in range(3)]
    for request in requests:  # one favourite token in every slot, so that drafted tokens are penalised too
        request["base_logits"][:, 42] = 14.0
    for request, draft in zip(requests, _math.draft_blocks(weights, FORMS[form], requests), strict=True):
        check_block(draft, expected_block(weights, request, FORMS[form]), weights)


@pytest.mark.parametrize("head", MARKOV_HEADS)
@pytest.mark.parametrize("with_markov", [True, False])
def test_confidence_equals_oracle(head, with_markov):
    rng = np.random.default_rng(9)
    weight = rng.normal(size=HIDDEN + RANK if with_markov else HIDDEN).astype(np.float32).tolist()
    weights = make_weights(head, rng, confidence=weight, confidence_bias=0.37)
    request = make_request(rng)
    for n_candidates in FORMS.values():
        draft = _math.draft_blocks(weights, n_candidates, [request])[0]
        expected = [slot.confidence_logit for slot in expected_block(weights, request, n_candidates)]
        np.testing.assert_allclose(draft["confidence_logits"], expected, atol=ATOL)


def test_no_confidence_head_gives_no_confidence():
    rng = np.random.default_rng(10)
    assert _math.draft_blocks(make_weights("vanilla", rng), 64, [make_request(rng)])[0]["confidence_logits"].size == 0


def test_sampled_tokens_follow_the_distribution_they_report():
    """20k blocks of one slot: the draws fit p^d of the head itself (fixed seeds, threshold as in test_acceptance)."""
    rng = np.random.default_rng(11)
    weights = make_weights("vanilla", rng)
    shared = {key: value[:1] if key in ("base_logits", "hidden") else value for key, value in make_request(rng).items()}
    requests = [{**shared, "seed": seed} for seed in range(20_000)]
    counts = np.zeros(N_VOCAB)
    drafts = _math.draft_blocks(weights, 8, requests)
    for draft in drafts:
        counts[draft["tokens"][0]] += 1
    law = np.zeros(N_VOCAB)
    ids, probs = drafts[0]["probs"][0]
    law[ids] = probs
    assert acceptance_oracle.chi_square_p(counts, law) > 1e-4


def test_greedy_drafts_report_a_certain_distribution():
    rng = np.random.default_rng(12)
    draft = _math.draft_blocks(make_weights("gated", rng), 64, [make_request(rng, temperature=0.0)])[0]
    for token, (ids, probs) in zip(draft["tokens"], draft["probs"], strict=True):
        assert ids.tolist() == [token]
        assert probs.tolist() == [1.0]


def test_no_requests_and_no_slots_are_legal():
    rng = np.random.default_rng(13)
    weights, request = make_weights("rnn", rng), make_request(rng)
    assert _math.draft_blocks(weights, 64, []) == []
    empty = {**request, "base_logits": request["base_logits"][:0], "hidden": request["hidden"][:0]}
    assert _math.draft_blocks(weights, 64, [empty])[0]["tokens"].size == 0


BAD_WEIGHTS = [
    ("vanilla", {"w1": np.zeros((3, RANK), np.float32)}, "markov_w1 must have shape 500 x 20, got 3 x 20"),
    ("vanilla", {"w2": np.zeros((N_VOCAB, 4), np.float32)}, "markov_w2 must have shape 500 x 20, got 500 x 4"),
    ("gated", {"gate": np.zeros((RANK, 5), np.float32)}, "markov_gate must have shape 20 x 68, got 20 x 5"),
    ("gated", {"gate_bias": [1.0]}, "markov_gate bias must have length 20, got 1"),
    ("rnn", {"joint": np.zeros((RANK, 5), np.float32)}, "markov_joint must have shape 60 x 88, got 20 x 5"),
    ("rnn", {"joint_bias": [1.0]}, "markov_joint bias must have length 60, got 1"),
    ("vanilla", {"d2t": [4, 4]}, "d2t must map one to one into the target vocabulary, got 4"),
    ("vanilla", {"d2t": [500]}, "d2t must map one to one into the target vocabulary, got 500"),
    ("vanilla", {"confidence": [0.0] * 3, "confidence_bias": 0.0}, "confidence weight length must be 48 or 68, got 3"),
    ("vanilla", {"logit_softcap": -1.0}, "logit_softcap must be finite and at least 0, got -1.000000"),
    ("none", {"n_vocab": 0}, "n_vocab must be positive, got 0"),
    ("none", {"hidden_size": 0}, "hidden_size must be positive, got 0"),
]


@pytest.mark.parametrize(("head", "change", "message"), BAD_WEIGHTS, ids=[case[2] for case in BAD_WEIGHTS])
def test_bad_weights_are_named(head, change, message):
    weights = {**make_weights(head, np.random.default_rng(0)), **change}
    for n_candidates in (0, 64):
        with pytest.raises(ValueError, match=f"^{message}$"):
            _math.draft_blocks(weights, n_candidates, [])


BAD_REQUESTS = [
    ({"anchor": -1}, ValueError, "anchor must be a token below 500, got -1"),
    ({"anchor": 500}, ValueError, "anchor must be a token below 500, got 500"),
    ({"base_logits": np.zeros((2, N_VOCAB), np.float32)}, ValueError, "must have a row per slot, got 2"),
    (
        {"base_logits": np.full((N_SLOTS, N_VOCAB), np.nan, np.float32)},
        RuntimeError,
        "logits must not hold NaN or .inf, got nan at token 0",
    ),
    (
        {"base_logits": np.full((N_SLOTS, N_VOCAB), -np.inf, np.float32)},
        RuntimeError,
        "logits must hold a finite value, got none",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_REQUESTS, ids=[case[2] for case in BAD_REQUESTS])
def test_bad_requests_are_named(change, error, message):
    rng = np.random.default_rng(0)
    weights = make_weights("vanilla", rng)
    for n_candidates in (0, 64):
        with pytest.raises(error, match=message):
            _math.draft_blocks(weights, n_candidates, [{**make_request(rng), **change}])


def test_bad_candidates_are_named():
    rng = np.random.default_rng(0)
    request = {key: value for key, value in make_request(rng).items() if key != "base_logits"}
    for slot in (([3, 900], [0.0, 0.0]), ([3], [0.0, 0.0]), ([-1], [0.0])):
        with pytest.raises(ValueError, match="candidates must be known tokens with one logit each"):
            _math.draft_blocks(make_weights("vanilla", rng), 64, [{**request, "candidates": [slot] * N_SLOTS}])
    with pytest.raises(ValueError, match="n_candidates must be positive, got -1"):
        _math.draft_blocks(make_weights("vanilla", rng), -1, [])
