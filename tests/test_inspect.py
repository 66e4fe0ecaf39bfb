"""dspark inspect: what a file is, whether two fit, and that no damaged file costs more than an error message."""

import json
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from convert_files import (
    D_MODEL,
    RANK,
    VOCAB,
    build_header,
    list_shapes,
    make_config,
    make_tensors,
    rewrite_gguf,
    write_checkpoint,
    write_target,
)
from dspark_cpp.convert import ConvertOptions, convert, summarize
from dspark_cpp.convert.cli import inspect_command
from dspark_cpp.convert.drafter_config import DrafterConfig
from dspark_cpp.convert.gguf_file import GGUFFile
from dspark_cpp.convert.inspect import compare_files
from dspark_cpp.convert.metadata import read_drafter
from dspark_cpp.convert.pair import LAST_LAYER_ARCHITECTURES, TAPPABLE_ARCHITECTURES
from dspark_cpp.errors import ModelLoadError
from typer.testing import CliRunner

app = typer.Typer()
app.command()(inspect_command)


def run(*args: object) -> Any:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def make_drafter(path: Path, target: Path, own_embeddings: bool = False, **changes: Any) -> Path:
    config = make_config(**changes)
    checkpoint = write_checkpoint(path / "checkpoint", config, make_tensors(list_shapes(config)))
    output = path / "drafter.gguf"
    convert(ConvertOptions(checkpoint, target, output, own_embeddings=own_embeddings))
    return output


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return write_target(tmp_path / "target.gguf")


@pytest.fixture
def drafter(tmp_path: Path, target: Path) -> Path:
    return make_drafter(tmp_path, target)


# What a file is


def test_inspect_target_facts(target: Path) -> None:
    summary = summarize(target)
    assert summary.kind == "target"
    assert summary.n_bytes == target.stat().st_size
    facts = summary.facts
    assert facts["architecture"] == "qwen3"
    assert (facts["layers"], facts["hidden_size"], facts["vocabulary"]) == (5, D_MODEL, VOCAB)
    assert facts["parameters"] == VOCAB * D_MODEL
    assert facts["output_head"] == "tied to the embedding"
    assert facts["can_be_tapped"] == "yes, layers 0 to 3"
    assert facts["tokenizer"] == "gpt2/qwen2"
    assert summary.types == {"F32": {"n_tensors": 1, "n_bytes": VOCAB * D_MODEL * 4}}
    assert summary.metadata["tokenizer.ggml.tokens"] == f"[{VOCAB} x string]"
    assert summary.problems == summary.notes == []


def test_inspect_target_that_cannot_be_tapped(tmp_path: Path) -> None:
    summary = summarize(write_target(tmp_path / "t.gguf", architecture="bloom"))
    assert summary.facts["can_be_tapped"] == "no"
    assert summary.notes == ["no drafter can be used: llama.cpp offers no hidden states of bloom models"]


def test_inspect_target_does_not_count_prediction_layers(tmp_path: Path) -> None:
    target = rewrite_gguf(write_target(tmp_path / "t.gguf"), {"qwen3.nextn_predict_layers": 1})
    assert summarize(target).facts["layers"] == 4


def test_inspect_drafter_facts(drafter: Path) -> None:
    summary = summarize(drafter)
    facts = summary.facts
    assert summary.kind == "drafter"
    assert facts["taps_target_layers"] == [-1, 1, 3]
    assert (facts["block_size"], facts["mask_token"]) == (7, 79)
    assert facts["sequential_head"] == "vanilla, rank 32"
    assert facts["confidence_head"] == "on hidden state and Markov feature"
    assert facts["embedding"] == facts["output_head"] == "borrowed from the target"
    assert facts["attention_in_block"] == "bidirectional"
    assert set(summary.types) == {"Q8_0", "F16", "F32"}
    assert summary.problems == summary.notes == []
    assert summary.calibration == {}


def test_inspect_drafter_reads_back_what_was_converted(tmp_path: Path, target: Path) -> None:
    config = make_config(markov_head_type="rnn", confidence_head_with_markov=False)
    file = make_drafter(tmp_path, target, markov_head_type="rnn", confidence_head_with_markov=False)
    found = read_drafter(GGUFFile(file)).config
    assert isinstance(found, DrafterConfig)
    assert found.markov_head_type == "rnn"
    assert found.has_confidence_head
    assert not found.confidence_with_markov
    assert found.hidden_size == config["hidden_size"]
    assert found.rms_norm_eps == pytest.approx(1e-6)
    assert found.rope_theta == 1e6
    assert len(summarize(file).notes) == 2


def test_inspect_drafter_with_own_embeddings(tmp_path: Path, target: Path) -> None:
    summary = summarize(make_drafter(tmp_path, target, own_embeddings=True))
    assert (summary.facts["embedding"], summary.facts["output_head"]) == ("own", "own")


def test_inspect_drafter_shows_calibration(drafter: Path) -> None:
    rewrite_gguf(drafter, {"dspark.calibration.rule": "block", "dspark.calibration.n_blocks": 1234})
    summary = summarize(drafter)
    assert summary.calibration == {"dspark.calibration.rule": "block", "dspark.calibration.n_blocks": 1234}
    assert not any(key.startswith("dspark.calibration") for key in summary.metadata)


def test_inspect_drafter_without_our_keys_reads_the_tensors(drafter: Path) -> None:
    """Files by llama.cpp's own converter lack the keys that are ours."""
    source = GGUFFile(drafter)
    ours = ("dflash.markov_head_type", "dflash.confidence_with_markov", "dflash.vocab_size")
    source.values = {key: value for key, value in source.values.items() if key not in ours}
    config = read_drafter(source).config
    assert config.markov_head_type == "vanilla"
    assert config.has_confidence_head
    assert config.confidence_with_markov
    assert config.vocab_size == VOCAB


def test_inspect_drafter_names_bad_tensors(drafter: Path) -> None:
    rewrite_gguf(drafter, {"dflash.feed_forward_length": 97, "dflash.markov_head_type": "gated"})
    problems = summarize(drafter).problems
    assert "missing tensors: markov_gate.weight, markov_gate.bias" in problems
    assert "shape of blk.0.ffn_up.weight must be [97, 64], got [96, 64]" in problems


def test_inspect_drafter_of_another_family_may_have_tensors_that_llama_cpp_knows(drafter: Path) -> None:
    rename = {"blk.0.attn_v.weight": "blk.0.attn_sinks.weight", "blk.1.attn_v.weight": "blk.1.post_ffw_norm.weight"}
    assert summarize(rewrite_gguf(drafter, rename=rename)).problems == []
    rewrite_gguf(drafter, rename={"fc.weight": "cf.weight"})
    assert summarize(drafter).problems == ["missing tensors: fc.weight", "superfluous tensors: cf.weight"]
    summary = summarize(rewrite_gguf(drafter, {"dflash.hyper_connection.count": 4}))
    assert summary.problems == []
    assert "DeepSeek-V4" in summary.notes[0]


def test_inspect_single_row_may_be_a_vector(drafter: Path) -> None:
    """llama.cpp's quantizer drops leading ones."""
    rewrite_gguf(drafter, vectors=("conf_proj.weight",))
    assert GGUFFile(drafter).tensors["conf_proj.weight"].shape == (D_MODEL + RANK,)
    summary = summarize(drafter)
    assert summary.problems == []
    assert summary.facts["confidence_head"] == "on hidden state and Markov feature"


def test_inspect_split_target(target: Path) -> None:
    rewrite_gguf(target, {"split.count": 2, "split.no": 0}, rename={"token_embd.weight": "blk.0.attn_q.weight"})
    assert summarize(target).facts["output_head"] == "in another part of the split model"
    rewrite_gguf(target, {"split.no": 1})
    with pytest.raises(ModelLoadError, match="name the first part"):
        summarize(target)


SOURCES = {"gpt-oss": "openai-moe", "llama-embed": "llama", "lfm2moe": "lfm2", "hunyuan-dense": "hunyuan-vl"}
SOURCES |= {"hunyuan_vl": "hunyuan-vl", "nemotron_h": "nemotron-h", "nemotron_h_moe": "nemotron-h"}


def test_tappable_architectures_are_those_of_the_pinned_llama_cpp() -> None:
    models = Path(__file__).parents[1] / "third_party" / "llama.cpp" / "src" / "src" / "models"
    if not models.is_dir():
        pytest.skip("llama.cpp is not unpacked")
    texts = {file.stem: file.read_text(encoding="utf-8") for file in models.glob("*.cpp")}
    found = {stem for stem, text in texts.items() if "t_layer_inp[il] =" in text}
    assert found == {SOURCES.get(name, name) for name in TAPPABLE_ARCHITECTURES}
    last = {stem for stem, text in texts.items() if "t_layer_inp[n_layer] =" in text}
    assert last == {SOURCES.get(name, name) for name in LAST_LAYER_ARCHITECTURES}


# Whether two fit

MISFITS: list[tuple[dict[str, Any], str]] = [
    ({"d_model": 32}, "hidden size must be the target's 32, got 64"),
    ({"vocab": 96}, "vocabulary size must be the target's 96, got 80"),
    ({"n_layers": 4}, "layer ids must be at most 2 (of 4 layers; llama.cpp taps the input of the layer after), got 3"),
    ({"architecture": "dflash"}, "target must be a language model, got a drafter"),
    ({"tokenizer": None}, "target must carry a tokenizer, got none"),
    ({"tokenizer": "llama"}, "tokenizer must be the target's llama/qwen2, got gpt2/qwen2"),
    ({"vocab": 70}, "mask token must be below the vocabulary size 70, got 79"),
]


@pytest.mark.parametrize(("changes", "reason"), MISFITS)
def test_compare_names_the_reason(tmp_path: Path, drafter: Path, changes: dict[str, Any], reason: str) -> None:
    other = write_target(tmp_path / "other.gguf", **changes)
    assert reason in compare_files(other, drafter)


def test_compare_fitting_pair_gives_no_reason(target: Path, drafter: Path) -> None:
    assert compare_files(target, drafter) == []


def test_compare_last_layer_can_be_tapped_where_llama_cpp_offers_it(tmp_path: Path, drafter: Path) -> None:
    # The drafter taps the output of layer 3: the last one of a target with four layers.
    assert compare_files(write_target(tmp_path / "a.gguf", "mimo2", n_layers=4), drafter) == []
    assert len(compare_files(write_target(tmp_path / "b.gguf", "qwen3", n_layers=4), drafter)) == 1


def test_compare_tolerates_a_few_other_tokens_but_no_other_vocabulary(tmp_path: Path) -> None:
    def names(n_changed: int) -> list[str]:
        return [f"new{i}" if i < n_changed else f"tok{i}é" for i in range(1000)]

    first = write_target(tmp_path / "first.gguf", vocab=1000, tokens=names(0))
    drafter = make_drafter(tmp_path, first, vocab_size=1000)
    assert compare_files(write_target(tmp_path / "a.gguf", vocab=1000, tokens=names(20)), drafter) == []
    reasons = compare_files(write_target(tmp_path / "b.gguf", vocab=1000, tokens=names(500)), drafter)
    assert reasons == ["tokens must be the target's, got 500 different ones"]


def test_compare_target_without_embedding(tmp_path: Path, target: Path) -> None:
    bare = rewrite_gguf(write_target(tmp_path / "bare.gguf"), {})
    bare.write_bytes(bare.read_bytes().replace(b"token_embd.weight", b"token_abcd.weight"))
    borrower = make_drafter(tmp_path, target)
    assert "target must carry token_embd for the drafter to borrow, got none" in compare_files(bare, borrower)


# The command


def test_command_shows_both_sides(target: Path, drafter: Path) -> None:
    result = run(drafter, "--target", target)
    assert result.exit_code == 0, result.output
    assert "taps target layers" in result.stdout
    assert "the two fit together" in result.stdout
    assert run(target, "--draft", drafter).exit_code == 0


def test_command_misfit_exits_1_with_reasons(tmp_path: Path, drafter: Path) -> None:
    result = run(write_target(tmp_path / "o.gguf", d_model=32, vocab=96), "--draft", drafter)
    assert result.exit_code == 1
    assert "the two do not fit together:" in result.stdout
    assert result.stdout.count("\n- ") == 2


def test_command_json_is_complete(target: Path, drafter: Path) -> None:
    data = json.loads(run(drafter, "--json", "--target", target).stdout)
    assert data["kind"] == "drafter"
    assert data["facts"]["taps_target_layers"] == [-1, 1, 3]
    assert data["fits"] is True
    assert data["reasons"] == []
    assert "fits" not in json.loads(run(target, "--json").stdout)


def test_command_metadata_lists_every_key(drafter: Path) -> None:
    assert "tokenizer.ggml.mask_token_id" not in run(drafter).stdout
    listing = run(drafter, "--metadata").stdout
    assert all(key in listing for key in GGUFFile(drafter).values)


def test_command_problems_exit_1(drafter: Path) -> None:
    result = run(rewrite_gguf(drafter, rename={"fc.weight": "cf.weight"}))
    assert result.exit_code == 1
    assert "problem: missing tensors: fc.weight" in result.stdout


def test_command_errors_are_one_line(tmp_path: Path) -> None:
    result = run(tmp_path / "missing.gguf")
    assert result.exit_code == 1
    assert result.stderr == f"error: cannot read {tmp_path / 'missing.gguf'}: no such file\n"
    assert run(tmp_path / "a", "--target", tmp_path / "b", "--draft", tmp_path / "c").exit_code == 2


def test_command_drafter_as_target_and_target_as_drafter(target: Path, drafter: Path) -> None:
    assert "must be a language model" in run(drafter, "--target", drafter).stdout
    assert "its architecture must be dflash, got qwen3" in run(target, "--target", target).stderr


# Damaged files

BIG = struct.pack("<Q", 2**63)
BAD_HEADERS = {
    "empty": (b"", "only 0 bytes"),
    "not gguf": (b"PK\x03\x04" + bytes(60), "does not begin with GGUF"),
    "version 1": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version must be 2 or 3"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version must be 2 or 3"),
    "absurd key count": (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60) + bytes(64), "cannot hold"),
    "absurd tensor count": (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0) + bytes(64), "cannot hold"),
    "absurd key length": (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + BIG + bytes(64), "ends early or is damaged"),
    "absurd string length": (build_header({"a": struct.pack("<I", 8) + BIG}) + bytes(64), "ends early or is damaged"),
    "absurd array length": (
        build_header({"a": struct.pack("<II", 9, 4) + BIG}) + bytes(64),
        "ends early or is damaged",
    ),
    "absurd string array": (
        build_header({"a": struct.pack("<II", 9, 8) + BIG}) + bytes(64),
        "more than the file can hold",
    ),
    "array of arrays": (build_header({"a": struct.pack("<IIQ", 9, 9, 1)}) + bytes(64), "array of arrays"),
    "unknown value type": (build_header({"a": struct.pack("<I", 13)}) + bytes(64), "unknown type 13"),
    "key that is not UTF-8": (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2) + b"\xff\xfe" + bytes(64), "not UTF-8"),
    "alignment 0": (build_header({"general.alignment": 0}), "power of two"),
    "alignment 3": (build_header({"general.alignment": 3}), "power of two"),
    "alignment text": (build_header({"general.alignment": "x"}), "power of two"),
    "five dimensions": (build_header(None, struct.pack("<Q1sI", 1, b"t", 5) + bytes(99), 1), "at most 4 dimensions"),
    "tensor outside": (
        build_header(None, struct.pack("<Q1sIQIQ", 1, b"t", 1, 2**40, 0, 0), 1) + bytes(64),
        "tensor t must lie inside the file",
    ),
    "tensor misplaced": (
        build_header(None, struct.pack("<Q1sIQIQ", 1, b"t", 1, 4, 0, 7), 1) + bytes(64),
        "tensor t must lie inside the file",
    ),
    "rows that do not divide": (
        build_header(None, struct.pack("<Q1sIQIQ", 1, b"t", 1, 33, 8, 0), 1) + bytes(64),
        "must be a multiple of 32",
    ),
    "tensor twice": (
        build_header(None, struct.pack("<Q1sIQIQ", 1, b"t", 1, 4, 0, 0) * 2, 2) + bytes(64),
        "tensor t stands twice",
    ),
    "key twice": (
        build_header().replace(struct.pack("<QQ", 0, 1), struct.pack("<QQ", 0, 2)) + build_header()[24:],
        "stands twice",
    ),
    "no architecture": (build_header({"general.name": "x"}), "general.architecture must be a text, got None"),
    "architecture number": (build_header({"general.architecture": 3}), "general.architecture must be a text, got 3"),
    "no block count": (build_header(), "qwen3.block_count must be a positive integer, got None"),
    "text block count": (
        build_header({"general.architecture": "a", "a.block_count": "x"}),
        "must be a positive integer",
    ),
    "drafter without keys": (build_header({"general.architecture": "dflash"}), "dflash.attention.head_count must be"),
}


@pytest.mark.parametrize(("raw", "message"), BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_inspect_bad_header_is_one_error(tmp_path: Path, raw: bytes, message: str) -> None:
    file = tmp_path / "bad.gguf"
    file.write_bytes(raw)
    start = time.process_time()
    with pytest.raises(ModelLoadError) as caught:
        summarize(file)
    assert str(caught.value).startswith(f"cannot read {file}: ")
    assert message in str(caught.value)
    assert time.process_time() - start < 1.0  # milliseconds are usual


def test_inspect_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="no such file"):
        summarize(tmp_path)


@pytest.mark.parametrize("which", ["target", "drafter"])
def test_inspect_every_truncation_is_an_error(tmp_path: Path, which: str, request: pytest.FixtureRequest) -> None:
    raw = request.getfixturevalue(which).read_bytes()
    file = tmp_path / "cut.gguf"
    for length in [*range(0, min(len(raw), 3000), 7), len(raw) // 2, len(raw) - 40]:
        file.write_bytes(raw[:length])
        with pytest.raises(ModelLoadError):
            summarize(file)


@pytest.mark.parametrize("which", ["target", "drafter"])
def test_inspect_random_damage_is_an_error_or_a_summary(
    tmp_path: Path, which: str, request: pytest.FixtureRequest, target: Path
) -> None:
    raw = np.frombuffer(request.getfixturevalue(which).read_bytes(), np.uint8)
    header = GGUFFile(request.getfixturevalue(which)).data_offset
    rng, file, n_errors = np.random.default_rng(3), tmp_path / "hurt.gguf", 0
    for _ in range(600):
        hurt = raw.copy()
        hurt[rng.integers(0, header, rng.integers(1, 4))] = rng.integers(0, 256)
        file.write_bytes(hurt.tobytes())
        try:
            json.dumps(summarize(file).to_dict())
            compare_files(target, file) if which == "drafter" else compare_files(file, target)
        except ModelLoadError:
            n_errors += 1
    assert n_errors > 0


def test_inspect_large_vocabulary_is_fast(tmp_path: Path) -> None:
    target = write_target(tmp_path / "big.gguf", vocab=152_000, d_model=1)
    start = time.process_time()
    summarize(target)
    # About 50 ms of computing are usual; an official reader that decodes every token takes seconds.
    assert time.process_time() - start < 1.0


def test_inspect_unknown_tensor_type_is_shown_by_number(tmp_path: Path) -> None:
    file = tmp_path / "new.gguf"
    values = {"general.architecture": "qwen3", "qwen3.block_count": 1, "qwen3.embedding_length": 4}
    file.write_bytes(build_header(values, struct.pack("<Q1sIQIQ", 1, b"t", 1, 4, 250, 0), 1) + bytes(64))
    assert summarize(file).types == {"type 250": {"n_tensors": 1, "n_bytes": 0}}
