"""`dspark-convert --draft-vocab`: which tokens are chosen, what the file holds, and what it drafts.

The oracle of a draft is the golden block of the PyTorch reference: its U over all tokens, cut down to the chosen ones,
and the greedy chain over them in numpy with the checkpoint's own Markov matrices.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from dspark_cpp import _core
from dspark_cpp.convert import ConvertOptions, convert
from dspark_cpp.convert.checkpoint import SafeTensor, open_checkpoint
from dspark_cpp.convert.cli import app
from dspark_cpp.convert.draft_vocab import SelectedRows, choose_draft_vocab
from dspark_cpp.errors import ModelLoadError
from pairs import DATA, read_prompts
from test_drafter_files import read_tensors
from test_goldens import load_case, relative_error
from typer.testing import CliRunner

N_VOCAB, END = 2048, 2046
TOLERANCE = 1e-3  # f32 sums in another order, as in test_goldens


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("\n".join(read_prompts(100)), encoding="utf-8")
    return path


def convert_reduced(target: Path, output: Path, n_tokens: int, corpus: Path | None, **options: Any) -> Path:
    convert(ConvertOptions(DATA / "vanilla", target, output, "f32", draft_vocab=n_tokens, corpus=corpus, **options))
    return output


@pytest.fixture(scope="module")
def reduced(f32_target: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_reduced(f32_target, tmp_path_factory.mktemp("reduced") / "drafter.gguf", 256, corpus)


# ---- the choice ----


def test_most_frequent_tokens_are_chosen_with_those_that_end_a_text() -> None:
    counts = np.zeros(500, dtype=np.int64)
    counts[400:464] = np.arange(64, 0, -1)
    vocab = choose_draft_vocab(64, counts, [499, 3])
    assert vocab.ids.tolist() == [3, *range(400, 462), 499]  # the two rarest made way
    assert vocab.coverage == 1 - (1 + 2) / counts.sum()


def test_number_of_tokens_fits_row_blocks() -> None:
    assert choose_draft_vocab(65, np.zeros(500, dtype=np.int64), []).ids.tolist() == list(range(128))
    assert choose_draft_vocab(490, np.zeros(500, dtype=np.int64), []).ids.size == 500


def test_without_a_corpus_the_lowest_ids_are_chosen(f32_target: Path, tmp_path: Path) -> None:
    options = ConvertOptions(DATA / "vanilla", f32_target, tmp_path / "d.gguf", "f32", draft_vocab=256)
    report = convert(options)
    ids = read_tensors(options.output)["d2t"]
    assert ids[:250].tolist() == list(range(250))
    assert END in ids
    assert any("lowest token ids" in note and "--corpus" in note for note in report.notes)


def test_corpus_of_json_lines(f32_target: Path, reduced: Path, corpus: Path, tmp_path: Path) -> None:
    lines = tmp_path / "corpus.jsonl"
    texts = corpus.read_text(encoding="utf-8").splitlines(keepends=True)
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    other = convert_reduced(f32_target, tmp_path / "lines.gguf", 256, lines)
    assert np.array_equal(read_tensors(other)["d2t"], read_tensors(reduced)["d2t"])


# ---- the file ----


def test_file_holds_the_rows_of_the_chosen_tokens(f32_target: Path, reduced: Path, corpus: Path) -> None:
    """Upstream's layout: absolute ids in I64, a row of head and W2 for each; W1 keeps all rows."""
    tensors = read_tensors(reduced)
    source = {name: t.rows(0, t.shape[0]) for name, t in open_checkpoint(DATA / "vanilla").tensors.items()}
    kind = next(t.tensor_type for t in gguf.GGUFReader(reduced).tensors if t.name == "d2t")
    assert kind == gguf.GGMLQuantizationType.I64
    ids = tensors["d2t"]
    model = _core.Model.load_target(str(f32_target))
    counts = np.zeros(N_VOCAB, dtype=int)
    for line in corpus.read_text(encoding="utf-8").splitlines(keepends=True):
        np.add.at(counts, model.tokenize(line, add_special=False), 1)
    assert counts[ids].sum() >= np.sort(counts)[-250:].sum()  # up to 6 tokens end a text
    assert END in ids
    assert np.array_equal(tensors["markov_w2.weight"], source["markov_head.markov_w2.weight"][ids])
    assert np.array_equal(tensors["markov_w1.weight"], source["markov_head.markov_w1.weight"])
    # The head is the checkpoint's own where it has one, else the target's; here they differ by Q8_0's rounding.
    assert relative_error(tensors["output.weight"], read_tensors(f32_target)["token_embd.weight"][ids]) < 0.01
    assert "token_embd.weight" not in tensors


def test_rows_are_gathered_from_anywhere() -> None:
    data = np.random.default_rng(1).standard_normal((50_000, 3)).astype(np.float32)
    ids = np.unique(np.random.default_rng(2).integers(0, 50_000, 700))
    rows = SelectedRows(SafeTensor(data.shape, "F32", data), ids)
    assert rows.shape == (ids.size, 3)
    assert np.array_equal(rows.rows(100, 650), data[ids[100:650]])


# ---- what it drafts ----


def reference_chain(golden: dict[str, np.ndarray], ids: np.ndarray) -> list[int]:
    """Greedy tokens over the chosen ids."""
    tensors = open_checkpoint(DATA / "vanilla").tensors
    w1, w2 = (tensors[f"markov_head.markov_{name}.weight"].rows(0, N_VOCAB) for name in ("w1", "w2"))
    tokens = [int(golden["tokens"][-1])]
    for base in golden["base_logits"]:
        tokens.append(int(ids[np.argmax(base[ids] + w2[ids] @ w1[tokens[-1]])]))
    return tokens[1:]


@pytest.mark.parametrize("head", ["full", "candidates", "graph"])
def test_draft_equals_the_reference_cut_down(f32_target: Path, reduced: Path, head: str) -> None:
    golden = load_case("vanilla", 0)  # the case that keeps U over all tokens
    ids = read_tensors(reduced)["d2t"]
    model = _core.Model.load_target(str(f32_target))
    drafter = _core.Model.load_drafter(str(reduced), model)
    result = _core._testing.draft_probe(model, drafter, golden["tokens"].tolist(), head=head)
    assert drafter.drafter_info.n_vocab_draft == ids.size
    # The head comes through the target's Q8_0, the reference's is bf16.
    assert relative_error(result["base_logits"][:, ids], golden["base_logits"][:, ids]) < 0.05
    assert np.isneginf(np.delete(result["base_logits"], ids, axis=1)).all()
    assert result["tokens"] == reference_chain(golden, ids)


def test_text_is_the_target_s(f32_target: Path, reduced: Path) -> None:
    model = _core.Model.load_target(str(f32_target))
    texts, n_accepted = [], 0
    for drafter in (None, _core.Model.load_drafter(str(reduced), model)):
        engine = _core.Engine(model, drafter, n_ctx=512, n_threads=1, kv_type="f32", flash_attention=False)
        tokens: list[int] = []
        for prompt in read_prompts(3):
            engine.submit(model.tokenize(prompt), _core.RequestOptions(max_tokens=32, temperature=0))
        while engine.has_work:
            for event in engine.step():
                tokens += event.tokens
        texts.append(tokens)
        n_accepted = engine.stats.n_accepted
    assert texts[0] == texts[1]
    assert n_accepted > 0


# ---- refusals ----

BAD = [
    ({"draft_vocab": -1}, "draft_vocab must be at least 0, got -1"),
    ({"draft_vocab": N_VOCAB}, "draft_vocab must be below the vocabulary size 2048, got 2048"),
    ({"corpus": Path("text")}, "corpus must be given together with draft_vocab"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_options_are_refused(f32_target: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert(ConvertOptions(DATA / "vanilla", f32_target, tmp_path / "d.gguf", **options))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("empty.txt", b"", ValueError, "corpus must hold text"),
        ("bad.txt", b"\xff\xfe\x00", ModelLoadError, r"cannot read .*bad.txt"),
        ("bad.jsonl", b'{"text": "a"}\n{"no": 1}\n', ValueError, "line 2 of .* must be an object with a text"),
    ],
)
def test_bad_corpus_is_refused(
    f32_target: Path, tmp_path: Path, name: str, content: bytes, error: type[Exception], message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message):
        convert_reduced(f32_target, tmp_path / "d.gguf", 256, tmp_path / name)
    with pytest.raises(ModelLoadError, match=r"cannot read .*none"):
        convert_reduced(f32_target, tmp_path / "d.gguf", 256, tmp_path / "none")


def test_command_line(demo_target: Path, corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "d.gguf"
    arguments = [str(DATA / "vanilla"), "-t", str(demo_target), "-o", str(output), "--draft-vocab", "512"]
    result = CliRunner().invoke(app, [*arguments, "--corpus", str(corpus)])
    assert result.exit_code == 0, result.output
    assert re.search(r"draft vocabulary: 512 tokens, [\d.]+% of the corpus", result.output)
    assert output.exists()
    assert read_tensors(output)["d2t"].size == 512
