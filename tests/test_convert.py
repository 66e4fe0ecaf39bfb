"""dspark-convert: every kind of checkpoint, every refusal, and nothing left behind when it fails."""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from convert_files import (
    CONFIG,
    D_MODEL,
    RANK,
    VOCAB,
    Arrays,
    list_shapes,
    make_config,
    make_tensors,
    read_gguf,
    rewrite_gguf,
    write_checkpoint,
    write_target,
)
from dspark_cpp.convert import ConvertOptions, conversion, convert, gguf_writer, summarize
from dspark_cpp.convert.cli import app
from dspark_cpp.convert.gguf_file import GGUFFile
from dspark_cpp.convert.inspect import compare_files
from dspark_cpp.errors import DSparkError, ModelLoadError, ModelMismatchError
from typer.testing import CliRunner

# Name in the checkpoint to name in the file, written out a second time.
NAMES = {
    "fc.weight": "fc.weight",
    "hidden_norm.weight": "enc.output_norm.weight",
    "norm.weight": "output_norm.weight",
    "markov_head.markov_w1.weight": "markov_w1.weight",
    "markov_head.markov_w2.weight": "markov_w2.weight",
    "markov_head.gate_proj.weight": "markov_gate.weight",
    "markov_head.gate_proj.bias": "markov_gate.bias",
    "markov_head.joint_proj.weight": "markov_joint.weight",
    "markov_head.joint_proj.bias": "markov_joint.bias",
    "confidence_head.proj.weight": "conf_proj.weight",
    "confidence_head.proj.bias": "conf_proj.bias",
    "embed_tokens.weight": "token_embd.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}


def to_gguf_name(name: str) -> str:
    if not name.startswith("layers."):
        return NAMES[name]
    _, layer, rest = name.split(".", 2)
    return f"blk.{layer}.{NAMES[rest]}"


class Setup:
    """A target, and a drafter that can be varied."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.target = write_target(path / "target.gguf")
        self.output = path / "out" / "drafter.gguf"
        self.output.parent.mkdir()
        self.config: dict[str, Any] = make_config()
        self.tensors: Arrays = {}

    def make(self, *, embed: bool = False, head: bool = False, **changes: Any) -> "Setup":
        self.config = make_config(**changes)
        self.tensors = make_tensors(list_shapes(self.config, embed, head))
        return self

    def write(self, **kwargs: Any) -> Path:
        return write_checkpoint(self.path / "drafter", self.config, self.tensors, **kwargs)

    def options(self, **kwargs: Any) -> ConvertOptions:
        return ConvertOptions(self.write(), self.target, self.output, **kwargs)

    def convert(self, **kwargs: Any) -> tuple[dict[str, Any], Arrays]:
        convert(self.options(**({"outtype": "f32"} | kwargs)))
        return read_gguf(self.output)

    def left_behind(self) -> list[str]:
        return sorted(file.name for file in self.output.parent.iterdir())


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(tmp_path).make()


KINDS = list(itertools.product(["vanilla", "gated", "rnn"], ["with markov", "hidden only", "none"]))


@pytest.mark.parametrize(("head", "confidence"), KINDS)
def test_convert_heads_writes_every_tensor(setup: Setup, head: str, confidence: str) -> None:
    setup.make(
        markov_head_type=head,
        enable_confidence_head=confidence != "none",
        confidence_head_with_markov=confidence == "with markov",
    )
    keys, tensors = setup.convert()
    assert set(tensors) == {to_gguf_name(name) for name in setup.tensors}
    for name, value in setup.tensors.items():
        assert np.array_equal(tensors[to_gguf_name(name)].reshape(value.shape), value), name
    assert keys["dflash.markov_head_type"] == head
    assert keys["dflash.has_confidence_head"] is (confidence != "none")
    assert keys["dflash.confidence_with_markov"] is (confidence == "with markov")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("n_shards", [1, 3])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_convert_storage_does_not_matter(setup: Setup, dtype: str, n_shards: int, prefix: str) -> None:
    path = setup.write(dtype=dtype, n_shards=n_shards, prefix=prefix)
    if n_shards > 1:
        (path / "model.safetensors").unlink(missing_ok=True)
    convert(ConvertOptions(path, setup.target, setup.output, "f32"))
    _, tensors = read_gguf(setup.output)
    for name, value in setup.tensors.items():
        expected = value.astype(np.float16) if dtype == "float16" else value
        assert np.array_equal(tensors[to_gguf_name(name)].reshape(value.shape), expected), name


def test_convert_writes_the_keys_that_llama_cpp_reads(setup: Setup) -> None:
    keys, _ = setup.convert(name="tiny")
    expected = {
        "general.architecture": "dflash",
        "general.name": "tiny",
        "dflash.block_count": 2,
        "dflash.context_length": 512,
        "dflash.embedding_length": D_MODEL,
        "dflash.feed_forward_length": 96,
        "dflash.attention.head_count": 4,
        "dflash.attention.head_count_kv": 2,
        "dflash.attention.key_length": 32,
        "dflash.attention.value_length": 32,
        "dflash.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "dflash.rope.freq_base": 1e6,
        "dflash.vocab_size": VOCAB,
        "dflash.block_size": 7,
        "dflash.target_layers": [0, 2, 4],
        "dflash.sample_from_anchor": True,
        "tokenizer.ggml.mask_token_id": 79,
    }
    assert {key: keys[key] for key in expected} == expected
    assert "dflash.attention.causal" not in keys
    assert "dflash.attention.sliding_window" not in keys


def test_convert_copies_tokenizer_keys_byte_by_byte(setup: Setup) -> None:
    setup.convert()
    source, copy = GGUFFile(setup.target), GGUFFile(setup.output)
    names = [key for key in source.values if key.startswith("tokenizer.")]
    assert len(names) >= 8
    assert all(source.encoded(key) == copy.encoded(key) for key in names)


def test_convert_sliding_window_writes_window_and_pattern(setup: Setup) -> None:
    setup.make(use_sliding_window=True, sliding_window=128, layer_types=["sliding_attention", "full_attention"])
    keys, _ = setup.convert()
    assert keys["dflash.attention.sliding_window"] == 128
    assert keys["dflash.attention.sliding_window_pattern"] == [True, False]


def test_convert_reads_rope_parameters(setup: Setup) -> None:
    setup.make(rope_theta=None, rope_parameters={"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0})
    keys, _ = setup.convert()
    assert keys["dflash.rope.freq_base"] == 5e5
    assert keys["dflash.rope.scaling.type"] == "yarn"
    assert keys["dflash.rope.scaling.factor"] == 4.0
    assert keys["dflash.rope.scaling.original_context_length"] == 512


def test_convert_multi_axis_target_gets_degenerate_sections(setup: Setup) -> None:
    writer = gguf.GGUFWriter(str(setup.target), "qwen35")
    writer.add_block_count(5)
    writer.add_embedding_length(D_MODEL)
    writer.add_rope_dimension_sections([11, 11, 10, 0])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(VOCAB)])
    writer.add_tensor("token_embd.weight", np.zeros((VOCAB, D_MODEL), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    keys, _ = setup.convert()
    assert keys["dflash.rope.dimension_sections"] == [16, 0, 0, 0]


# Embedding and head


def test_convert_borrows_by_default(setup: Setup) -> None:
    _, tensors = setup.make(embed=True, head=True, tie_word_embeddings=False).convert()
    assert "token_embd.weight" not in tensors
    assert "output.weight" not in tensors


def test_convert_own_embeddings_untied_writes_both(setup: Setup) -> None:
    setup.make(embed=True, head=True, tie_word_embeddings=False)
    _, tensors = setup.convert(own_embeddings=True)
    assert np.array_equal(tensors["token_embd.weight"], setup.tensors["embed_tokens.weight"])
    assert np.array_equal(tensors["output.weight"], setup.tensors["lm_head.weight"])


def test_convert_own_embeddings_tied_writes_the_embedding_twice(setup: Setup) -> None:
    _, tensors = setup.make(embed=True).convert(own_embeddings=True)
    assert np.array_equal(tensors["token_embd.weight"], setup.tensors["embed_tokens.weight"])
    assert np.array_equal(tensors["output.weight"], setup.tensors["embed_tokens.weight"])


@pytest.mark.parametrize("is_tied", [True, False])
def test_convert_own_embeddings_missing_come_from_the_target(setup: Setup, is_tied: bool) -> None:
    write_target(setup.target, is_tied=is_tied)
    _, tensors = setup.make(tie_word_embeddings=is_tied).convert(own_embeddings=True)
    _, target = read_gguf(setup.target)
    assert np.array_equal(tensors["token_embd.weight"], target["token_embd.weight"])
    head = "token_embd.weight" if is_tied else "output.weight"
    assert np.array_equal(tensors["output.weight"], target[head])


def test_convert_own_embeddings_untied_without_head_takes_the_targets_head(setup: Setup) -> None:
    write_target(setup.target, is_tied=False)
    setup.make(embed=True, tie_word_embeddings=False)
    _, tensors = setup.convert(own_embeddings=True)
    _, target = read_gguf(setup.target)
    assert np.array_equal(tensors["token_embd.weight"], setup.tensors["embed_tokens.weight"])
    assert np.array_equal(tensors["output.weight"], target["output.weight"])


def test_convert_notes_an_embedding_that_is_not_the_targets(setup: Setup) -> None:
    setup.make(embed=True)
    notes = convert(setup.options()).notes
    assert any("embed_tokens.weight is not the target's token_embd.weight" in note for note in notes)
    write_target(setup.target, tensors={"token_embd.weight": setup.tensors["embed_tokens.weight"]})
    assert convert(setup.options()).notes == []


# Quantization

# Largest error over the block's largest magnitude: half a step; a whole one for the sign that lacks the last level.
STEP = {"q8_0": 0.5 / 127, "q5_1": 1 / 31, "q5_0": 1 / 16, "q4_1": 1 / 15, "q4_0": 1 / 8}


@pytest.mark.parametrize("outtype", ["f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_convert_outtype_quantizes_matrices_only(setup: Setup, outtype: str) -> None:
    setup.make(markov_head_type="rnn", embed=True)
    report = convert(setup.options(outtype=outtype, own_embeddings=True))
    types = {tensor.name: tensor.type.lower() for tensor in report.tensors}
    matrices = [n for n in types if n in ("fc.weight", "token_embd.weight", "output.weight") or "blk." in n]
    matrices = [name for name in matrices if "norm" not in name]
    assert {types[name] for name in matrices} == {outtype}
    assert {types[name] for name in types if name.endswith(("norm.weight", "bias"))} == {"f32"}
    heads = {types[name] for name in ("markov_w1.weight", "markov_w2.weight", "markov_joint.weight")}
    assert heads == {"bf16" if outtype == "bf16" else "f16"}
    assert types["conf_proj.weight"] == "f32"


@pytest.mark.parametrize("outtype", list(STEP))
def test_convert_quantized_values_stay_within_a_step(setup: Setup, outtype: str) -> None:
    report = convert(setup.options(outtype=outtype))
    _, tensors = read_gguf(setup.output)
    value, stored = setup.tensors["fc.weight"], tensors["fc.weight"]
    peak = np.abs(value).reshape(-1, 32).max(axis=1).repeat(32).reshape(value.shape)
    # The scale itself is rounded to float16, which adds up to 2^-11 of the peak (three times that with an offset).
    assert np.all(np.abs(stored - value) <= peak * (STEP[outtype] * 1.001 + 3 * 2.0**-11))
    fc = next(tensor for tensor in report.tensors if tensor.name == "fc.weight")
    assert fc.max_error == pytest.approx(np.abs(stored - value).max())
    assert fc.relative_error == pytest.approx(np.linalg.norm(stored - value) / np.linalg.norm(value))


def test_convert_rows_that_do_not_divide_fall_back_to_f16(setup: Setup) -> None:
    setup.config["intermediate_size"] = 80
    for layer, name in itertools.product(range(2), ["gate", "up", "down"]):
        shape = (D_MODEL, 80) if name == "down" else (80, D_MODEL)
        setup.tensors[f"layers.{layer}.mlp.{name}_proj.weight"] = np.full(shape, 0.25, np.float32)
    report = convert(setup.options())
    down = next(tensor for tensor in report.tensors if tensor.name == "blk.0.ffn_down.weight")
    assert (down.type, down.note) == ("F16", "f16: rows of 80 do not divide into blocks of 32")


def test_convert_values_beyond_f16_are_kept_in_f32(setup: Setup) -> None:
    setup.tensors["markov_head.markov_w1.weight"][3, 4] = 2.0**20
    report = convert(setup.options())
    w1 = next(tensor for tensor in report.tensors if tensor.name == "markov_w1.weight")
    assert (w1.type, w1.note) == ("F32", "f32: values up to 1.05e+06 exceed f16")


def test_convert_tiny_values_pass_the_comparison(setup: Setup) -> None:
    for value in setup.tensors.values():
        value *= 1e-6  # scales become subnormal float16 numbers
    for outtype in STEP:
        convert(setup.options(outtype=outtype))


def test_convert_zero_tensor_passes_the_comparison(setup: Setup) -> None:
    setup.tensors["fc.weight"][:] = 0
    for outtype in (*STEP, "f16"):
        convert(setup.options(outtype=outtype))


class FakeCore:
    """Stands in for the compiled module: "quantizes" by copying, and notes what it was asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[str]]] = []

    def quantize_model(self, src: str, dst: str, ftype: str, keep: list[str]) -> None:
        self.calls.append((ftype, keep))
        Path(dst).write_bytes(Path(src).read_bytes())


def test_convert_k_quants_go_through_the_core(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    core = FakeCore()
    monkeypatch.setattr(conversion, "_load_core", lambda: core)
    report = convert(setup.options(outtype="q4_k_m"))
    ((ftype, keep),) = core.calls
    assert ftype == "q4_k_m"
    # The tiny rows do not divide into blocks of 256, so everything is kept as planned.
    assert set(keep) == {tensor.name for tensor in report.tensors}
    assert {tensor.type for tensor in report.tensors} == {"F16", "F32"}
    assert setup.left_behind() == ["drafter.gguf"]


def test_convert_k_quants_drop_leading_ones(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp writes the single row of the confidence head as a vector."""

    class Core(FakeCore):
        def quantize_model(self, src: str, dst: str, ftype: str, keep: list[str]) -> None:
            super().quantize_model(src, dst, ftype, keep)
            rewrite_gguf(Path(dst), vectors=("conf_proj.weight",))

    monkeypatch.setattr(conversion, "_load_core", Core)
    report = convert(setup.options(outtype="q4_k_m"))
    assert next(t for t in report.tensors if t.name == "conf_proj.weight").shape == (1, D_MODEL + RANK)


def test_convert_k_quants_dry_run_says_that_types_are_estimates(setup: Setup) -> None:
    assert "estimates" in convert(setup.options(outtype="q4_k_m", is_dry_run=True)).notes[0]


def test_convert_k_quants_without_core_say_what_is_missing(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dspark_cpp._core", None)
    with pytest.raises(DSparkError, match="need the compiled module"):
        convert(setup.options(outtype="q6_k"))
    assert setup.left_behind() == []


@pytest.mark.parametrize(("outtype", "bound"), [("q6_k", 0.03), ("q4_k_m", 0.1), ("iq4_xs", 0.1)])
def test_convert_k_quants_with_the_real_core(setup: Setup, outtype: str, bound: float) -> None:
    """Relative errors of normally distributed weights are about 0.018, 0.072 and 0.077."""
    pytest.importorskip("dspark_cpp._core")
    setup.make(hidden_size=256, intermediate_size=512, head_dim=64, markov_rank=64, markov_head_type="gated")
    write_target(setup.target, d_model=256)
    report = convert(setup.options(outtype=outtype))
    types = {tensor.name: tensor.type for tensor in report.tensors}
    assert types["fc.weight"] in ("Q6_K", "Q4_K", "IQ4_XS")
    assert types["markov_w1.weight"] == types["markov_gate.weight"] == "F16"
    assert max(tensor.relative_error for tensor in report.tensors) < bound
    assert setup.left_behind() == ["drafter.gguf"]


def test_convert_core_failure_leaves_nothing(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def quantize_model(self, *args: object) -> None:
            raise RuntimeError("out of luck")

    monkeypatch.setattr(conversion, "_load_core", Broken)
    with pytest.raises(DSparkError, match="cannot quantize to q6_k: out of luck"):
        convert(setup.options(outtype="q6_k"))
    assert setup.left_behind() == []


# Other layouts


def test_convert_nested_dflash_config(setup: Setup) -> None:
    setup.config = make_config(
        architectures=["DSparkDraftModel"],
        target_layer_ids=None,
        mask_token_id=None,
        markov_rank=None,
        enable_confidence_head=None,
        confidence_head_with_markov=None,
        dflash_config={"target_layer_ids": [-1, 1, 3], "mask_token_id": 79, "causal": True},
    )
    keys, tensors = setup.convert()
    assert keys["dflash.target_layers"] == [0, 2, 4]
    assert keys["dflash.attention.causal"] is True
    assert keys["dflash.has_confidence_head"] is True
    assert tensors["markov_w1.weight"].shape == (VOCAB, RANK)


def make_speculators_config() -> dict[str, Any]:
    top = ("markov_rank", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov", "block_size")
    layer = {key: value for key, value in CONFIG.items() if key not in top and value is not None}
    for key in ("architectures", "target_layer_ids", "mask_token_id", "num_target_layers"):
        del layer[key]
    return {key: CONFIG[key] for key in top} | {
        "architectures": ["DSparkSpeculator"],
        "speculators_model_type": "dspark",
        "mask_token_id": 79,
        "aux_hidden_state_layer_ids": [0, 2, 4],
        "draft_vocab_size": 48,
        "transformer_layer_config": layer | {"architectures": ["Qwen3ForCausalLM"]},
    }


def test_convert_speculators_layout(setup: Setup) -> None:
    setup.make(draft_vocab_size=48, head=True)
    setup.config = make_speculators_config()
    ids = np.sort(np.random.default_rng(1).choice(VOCAB, 48, replace=False))
    setup.tensors["d2t"] = (ids - np.arange(48)).astype(np.int64)
    setup.tensors["t2d"] = np.isin(np.arange(VOCAB), ids).astype(np.int64)
    keys, tensors = setup.convert()
    assert keys["dflash.target_layers"] == [0, 2, 4]
    assert keys["dflash.sample_from_anchor"] is False
    assert np.array_equal(tensors["d2t"], ids)
    assert np.array_equal(tensors["output.weight"], setup.tensors["lm_head.weight"])
    assert tensors["markov_w2.weight"].shape == (48, RANK)
    assert "token_embd.weight" not in tensors


@pytest.mark.parametrize("bad", [np.zeros(48, np.int64) + 40, -np.arange(48), -np.arange(48) - 1])
def test_convert_map_outside_the_vocabulary_is_refused(setup: Setup, bad: Any) -> None:
    setup.make(draft_vocab_size=48, head=True)
    setup.tensors["d2t"] = bad
    with pytest.raises(ModelLoadError, match="d2t must name different tokens below 80"):
        setup.convert()


# The shipped pair

DATA = Path(__file__).parent / "data" / "demo_pair"


@pytest.mark.parametrize("head", ["vanilla", "gated", "rnn"])
def test_convert_shipped_checkpoints(tmp_path: Path, demo_target: Path, head: str) -> None:
    output = tmp_path / "drafter.gguf"
    report = convert(ConvertOptions(DATA / head, demo_target, output))
    assert summarize(output).facts["sequential_head"].startswith(head)
    assert compare_files(demo_target, output) == []
    assert max(tensor.relative_error for tensor in report.tensors) < 0.01
    # No embedding is shipped with the checkpoint, so there is nothing to disagree with.
    assert [note for note in report.notes if "llama.cpp itself" not in note] == []


def test_shipped_drafter_is_what_conversion_makes(tmp_path: Path, demo_target: Path, demo_drafter: Path) -> None:
    convert(ConvertOptions(DATA / "vanilla", demo_target, tmp_path / "drafter.gguf", name="dspark-cpp demo drafter"))
    made, shipped = GGUFFile(tmp_path / "drafter.gguf"), GGUFFile(demo_drafter)
    assert list(made.tensors) == list(shipped.tensors)
    for name in made.tensors:
        assert np.array_equal(made.tensor_rows(name), shipped.tensor_rows(name)), name
    keys = [key for key in shipped.values if not key.startswith("dspark.calibration.")]
    assert keys == list(made.values)
    assert all(made.encoded(key) == shipped.encoded(key) for key in keys)


# Refusals: everything wrong is named at once


def test_convert_names_all_bad_tensors_at_once(setup: Setup) -> None:
    del setup.tensors["fc.weight"], setup.tensors["layers.1.self_attn.q_norm.weight"]
    setup.tensors["extra.weight"] = np.zeros(3, np.float32)
    setup.tensors["norm.weight"] = np.zeros(D_MODEL + 1, np.float32)
    setup.tensors["layers.0.mlp.up_proj.weight"] = np.zeros((D_MODEL, 96), np.float32)
    with pytest.raises(ModelLoadError) as caught:
        setup.convert()
    text = str(caught.value)
    assert "missing tensors: fc.weight, layers.1.self_attn.q_norm.weight" in text
    assert "superfluous tensors: extra.weight" in text
    assert "shape of norm.weight must be [64], got [65]" in text
    assert "shape of layers.0.mlp.up_proj.weight must be [96, 64], got [64, 96]" in text


def test_convert_names_all_bad_config_entries_at_once(setup: Setup) -> None:
    setup.config |= {"hidden_size": -1, "rms_norm_eps": "small", "block_size": None, "markov_head_type": "lstm"}
    setup.config |= {"mask_token_id": 80, "target_layer_ids": [1, "x"], "hidden_act": "gelu"}
    with pytest.raises(ModelLoadError) as caught:
        setup.convert()
    for name in ("hidden_size", "rms_norm_eps", "block_size", "markov_head_type", "mask_token_id", "hidden_act"):
        assert f"{name} must" in str(caught.value)
    assert "target_layer_ids must be a list of integers" in str(caught.value)


BAD_CONFIGS = [
    ({"architectures": ["LlamaForCausalLM"]}, "architectures must name one of Qwen3DSparkModel"),
    ({"architectures": None}, "architectures must name one of"),
    ({"hidden_size": True}, "hidden_size must be an integer"),
    ({"hidden_size": 2**40}, "hidden_size must be an integer"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers must be an integer of 1 to 512, got 1000000000"),
    ({"vocab_size": 0}, "vocab_size must be an integer of 2 to"),
    ({"num_key_value_heads": 3}, "num_key_value_heads must divide 4, got 3"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a positive number"),
    ({"rope_theta": float("inf")}, "rope_theta must be a positive number"),
    ({"markov_rank": 0}, "markov_rank must be an integer of 1 to 2147483647, got 0"),
    ({"target_layer_ids": []}, "target_layer_ids must be a list"),
    ({"target_layer_ids": [-2]}, "target_layer_ids must be a list of integers of at least -1"),
    ({"enable_confidence_head": "yes"}, "enable_confidence_head must be true or false"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "rope_type must be default, linear or yarn"),
    ({"attention_bias": True}, "attention_bias must be false"),
    ({"rope_is_neox_style": False}, "rope_is_neox_style must be true"),
    ({"layer_types": ["sliding_attention"], "sliding_window": 8, "use_sliding_window": True}, "must have 2 entries"),
    ({"draft_vocab_size": 81}, "draft_vocab_size must be at most 80"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_CONFIGS)
def test_convert_bad_config_is_refused(setup: Setup, changes: dict[str, Any], message: str) -> None:
    setup.config = make_config(**changes)
    with pytest.raises(ModelLoadError, match=message.replace("[", r"\[")):
        setup.convert()
    assert setup.left_behind() == []


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_convert_names_every_tensor_that_is_not_finite(setup: Setup, bad: float) -> None:
    setup.tensors["fc.weight"][5, 6] = bad
    setup.tensors["markov_head.markov_w2.weight"][0, 0] = bad
    with pytest.raises(ModelLoadError, match=r"NaN or infinite values: fc.weight, markov_w2.weight"):
        setup.convert()
    assert setup.left_behind() == []


def test_convert_missing_head_tensors_are_named(setup: Setup) -> None:
    setup.config["markov_head_type"] = "gated"
    with pytest.raises(
        ModelLoadError, match=r"missing tensors: markov_head.gate_proj.weight, markov_head.gate_proj.bias"
    ):
        setup.convert()


def test_convert_confidence_that_the_config_denies_is_superfluous(setup: Setup) -> None:
    setup.config["enable_confidence_head"] = False
    with pytest.raises(
        ModelLoadError, match=r"superfluous tensors: confidence_head.proj.bias, confidence_head.proj.weight"
    ):
        setup.convert()


def test_convert_notes_what_llama_cpp_cannot_load(setup: Setup) -> None:
    assert convert(setup.options()).notes == []
    setup.make(markov_head_type="rnn", confidence_head_with_markov=False)
    notes = convert(setup.options()).notes
    assert notes == [
        "llama.cpp itself cannot load this file: it knows no rnn head",
        "llama.cpp itself cannot load this file: its confidence head needs the Markov feature",
    ]


MISMATCHES: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"d_model": 32}, {}, "hidden size must be the target's 32, got 64"),
    ({"vocab": 96}, {}, "vocabulary size must be the target's 96, got 80"),
    ({"n_layers": 4}, {"num_target_layers": None}, "layer ids must be at most 2"),
    ({"n_layers": 6}, {}, "number of target layers must be 5, got 6"),
    ({"architecture": "gpt2"}, {}, "must be one that can be tapped"),
    ({"architecture": "dflash"}, {}, "target must be a language model, got a drafter"),
    ({"tokenizer": None}, {}, "target must carry a tokenizer"),
]


@pytest.mark.parametrize(("target", "changes", "message"), MISMATCHES)
def test_convert_wrong_target_is_refused(
    setup: Setup, target: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    write_target(setup.target, **target)
    setup.config = make_config(**changes)
    with pytest.raises(ModelMismatchError, match=message):
        setup.convert()
    assert setup.left_behind() == []


def test_convert_names_every_reason_of_a_mismatch_at_once(setup: Setup) -> None:
    write_target(setup.target, d_model=32, vocab=70, n_layers=2, architecture="bloom")
    with pytest.raises(ModelMismatchError) as caught:
        setup.convert()
    for text in (
        "architecture",
        "hidden size",
        "vocabulary size",
        "mask token must be below",
        "layer ids",
        "number of",
    ):
        assert text in str(caught.value)


# Damage


def damage_config(path: Path) -> None:
    (path / "config.json").write_text("{")


def remove_config(path: Path) -> None:
    (path / "config.json").unlink()


def list_config(path: Path) -> None:
    (path / "config.json").write_text("[]")


def truncate_weights(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def truncate_header(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:20])


def empty_weights(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"")


def inflate_header(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"\xff" * 64)


def remove_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()


def lie_about_shape(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b"[64,192]", b"[64,193]"))


def lie_about_dtype(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"BF16"', b'"F8_X"'))


def break_entry(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"shape"', b'"shope"'))


def point_outside(path: Path) -> None:
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"fc.weight": "../x.safetensors"}}))


def miss_a_shard(path: Path) -> None:
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"fc.weight": "x.safetensors"}}))


DAMAGES = [
    (damage_config, "config.json"),
    (remove_config, "config.json"),
    (list_config, "must hold an object"),
    (truncate_weights, "damaged or incomplete"),
    (truncate_header, "cut off"),
    (empty_weights, "model.safetensors"),
    (inflate_header, "not a safetensors file"),
    (remove_weights, "holds no .safetensors file"),
    (lie_about_shape, "fc.weight of shape"),
    (lie_about_dtype, "dtype of"),
    (break_entry, "damaged entry"),
    (point_outside, "weight_map must map"),
    (miss_a_shard, "missing shards: x.safetensors"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_convert_damaged_checkpoint_is_refused(setup: Setup, damage: Any, message: str) -> None:
    path = setup.write()
    damage(path)
    with pytest.raises(ModelLoadError, match=message):
        convert(ConvertOptions(path, setup.target, setup.output))
    assert setup.left_behind() == []


def test_convert_hub_id_without_the_extra_says_so(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModelLoadError, match=r"needs the hub extra \(pip install 'dspark-cpp\[hub\]'\)"):
        convert(ConvertOptions("owner/name", setup.target, setup.output))
    with pytest.raises(ModelLoadError, match="must be a directory or a hub id"):
        convert(ConvertOptions("/no/such/place", setup.target, setup.output))


def test_convert_hub_id_downloads_with_the_extra(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    path = setup.write()

    class Hub:
        @staticmethod
        def snapshot_download(repo: str, allow_patterns: list[str]) -> str:
            assert repo == "owner/name"
            return str(path)

    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)
    convert(ConvertOptions("owner/name", setup.target, setup.output))
    assert setup.left_behind() == ["drafter.gguf"]


# Nothing half-written


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError])
def test_convert_crash_while_writing_leaves_the_old_file(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    setup.output.write_bytes(b"old")
    calls = []

    def crash(rows: Any, kind: Any) -> bytes:
        calls.append(kind)
        if len(calls) > 5:
            raise error("stop")
        return original(rows, kind)

    original = gguf_writer.encode_rows
    monkeypatch.setattr(gguf_writer, "encode_rows", crash)
    with pytest.raises(error):
        convert(setup.options())
    assert setup.left_behind() == ["drafter.gguf"]
    assert setup.output.read_bytes() == b"old"


def test_convert_wrong_bytes_are_found_and_nothing_is_left(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    original = gguf_writer.encode_rows
    monkeypatch.setattr(gguf_writer, "encode_rows", lambda rows, kind: original(np.roll(rows, 1, axis=-1), kind))
    with pytest.raises(DSparkError, match=r"cannot verify the written file: .*fc.weight is off by"):
        convert(setup.options())
    assert setup.left_behind() == []


def test_convert_success_replaces_the_old_file(setup: Setup) -> None:
    setup.output.write_bytes(b"old")
    convert(setup.options())
    assert setup.output.read_bytes()[:4] == b"GGUF"
    assert setup.output.stat().st_mode & 0o400


def test_convert_is_reproducible(setup: Setup) -> None:
    convert(setup.options())
    first = setup.output.read_bytes()
    convert(setup.options())
    assert setup.output.read_bytes() == first


def test_convert_refuses_to_overwrite_its_sources(setup: Setup) -> None:
    path = setup.write()
    for output in (setup.target, path / "model.safetensors", path / "config.json"):
        with pytest.raises(ValueError, match="output must not be the target or part of the checkpoint"):
            convert(ConvertOptions(path, setup.target, output))
    with pytest.raises(ValueError, match="output must be a file"):
        convert(ConvertOptions(path, setup.target, setup.path))
    with pytest.raises(ValueError, match=r"outtype must be one of f32, f16"):
        convert(ConvertOptions(path, setup.target, setup.output, "q9_0"))
    with pytest.raises(DSparkError, match=r"cannot write .*: No such file"):
        convert(ConvertOptions(path, setup.target, setup.path / "nowhere" / "x.gguf"))


def test_convert_dry_run_writes_nothing_and_foresees_the_result(setup: Setup) -> None:
    plan = convert(setup.options(is_dry_run=True))
    assert setup.left_behind() == []
    done = convert(setup.options())
    assert [(t.name, t.type, t.n_bytes) for t in plan.tensors] == [(t.name, t.type, t.n_bytes) for t in done.tensors]


def test_convert_reports_progress_up_to_the_end(setup: Setup) -> None:
    seen: list[float] = []
    convert(setup.options(), lambda name, fraction: seen.append(fraction))
    assert seen == sorted(seen)
    assert seen[-1] == pytest.approx(1.0)


def test_convert_large_tensors_in_pieces(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(setup.options())
    whole = setup.output.read_bytes()
    monkeypatch.setattr(gguf_writer, "_CHUNK_ELEMENTS", 500)
    convert(setup.options())
    assert setup.output.read_bytes() == whole


# The command


def run_command(*args: object) -> Any:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def test_command_converts_and_prints_the_table(setup: Setup) -> None:
    result = run_command(setup.write(), "--target", setup.target, "-o", setup.output, "--outtype", "Q8_0")
    assert result.exit_code == 0, result.output
    assert "wrote and verified" in result.stdout
    assert "blk.1.ffn_down.weight" in result.stdout
    assert setup.left_behind() == ["drafter.gguf"]


def test_command_dry_run_writes_nothing(setup: Setup) -> None:
    result = run_command(setup.write(), "--target", setup.target, "-o", setup.output, "--dry-run")
    assert result.exit_code == 0
    assert "would write" in result.stdout
    assert setup.left_behind() == []


def test_command_errors_are_one_line(setup: Setup) -> None:
    path = setup.write()
    remove_weights(path)
    result = run_command(path, "--target", setup.target, "-o", setup.output)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: cannot convert")
    assert result.stderr.count("\n") == 1


def test_command_usage_errors_exit_2(setup: Setup) -> None:
    assert run_command(setup.write()).exit_code == 2
    assert run_command(setup.write(), "--target", setup.target, "--frobnicate").exit_code == 2
