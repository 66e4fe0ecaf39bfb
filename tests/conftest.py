"""What tests share: the bundled pair, the same pair in 32-bit floats, and prompts for it."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

with contextlib.suppress(ImportError):  # the same examples in every run; --hypothesis-profile=random makes others
    from hypothesis import HealthCheck, settings

    for name, is_same in (("steady", True), ("random", False)):
        untimed = {"deadline": None, "suppress_health_check": list(HealthCheck)}
        settings.register_profile(name, derandomize=is_same, **untimed)
    settings.load_profile("steady")

DEMO = Path(__file__).parents[1] / "python" / "dspark_cpp" / "demo"


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Measured costs go to a folder of this run: tests neither use the user's nor leave theirs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSPARK_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def demo_target() -> Path:
    """The bundled target."""
    return DEMO / "target.gguf"


@pytest.fixture(scope="session")
def demo_drafter() -> Path:
    """The bundled drafter."""
    return DEMO / "drafter.gguf"


@pytest.fixture(scope="session")
def f32_target(demo_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled target in 32-bit floats: batched and single passes then agree but for the last bits."""
    return dequantize(demo_target, tmp_path_factory.mktemp("f32") / "target.gguf")


@pytest.fixture(scope="session")
def f32_drafter(demo_drafter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled drafter in 32-bit floats."""
    return dequantize(demo_drafter, tmp_path_factory.mktemp("f32") / "drafter.gguf")


@pytest.fixture(scope="session")
def target(f32_target: Path) -> Any:
    """That target, loaded; modules with another one have a fixture of their own."""
    from dspark_cpp import _core

    return _core.Model.load_target(str(f32_target))


@pytest.fixture(scope="session")
def drafter(f32_drafter: Path, target: Any) -> Any:
    """Its drafter, loaded."""
    from dspark_cpp import _core

    return _core.Model.load_drafter(str(f32_drafter), target)


@pytest.fixture(scope="session")
def prompts(target: Any) -> list[list[int]]:
    """Eight prompts of the three domains, as tokens."""
    from pairs import read_prompts

    return [target.tokenize(text) for text in read_prompts(8)]


@pytest.fixture(scope="session")
def demo_questions() -> dict[str, list[str]]:
    """Questions of the three domains that the pair has not seen."""
    questions: dict[str, list[str]] = json.loads((DEMO / "prompts.json").read_text(encoding="utf-8"))
    return questions


@pytest.fixture(scope="session")
def questions(demo_questions: dict[str, list[str]]) -> list[str]:
    """All of them in one list."""
    return [question for domain in demo_questions.values() for question in domain]


@pytest.fixture(scope="session")
def llm(f32_target: Path, f32_drafter: Path) -> Iterator[Any]:
    """The f32 pair with room for 8 requests; tests that close an LLM make their own.

    Without flash attention: for an f32 cache it is ggml's, which rounds to f16 inside, and then a token's logits depend
    on its neighbours in the batch by some 1e-2. Without it they agree to 1e-5, far below the margins of these prompts.
    """
    from dspark_cpp import LLM

    with LLM(
        f32_target, f32_drafter, n_ctx=512, n_parallel=8, n_threads=1, kv_type="f32", flash_attention=False
    ) as llm:
        yield llm


@pytest.fixture(scope="session")
def no_confidence_drafter(demo_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled drafter's checkpoint, converted without its confidence head."""
    from dspark_cpp.convert import ConvertOptions, convert

    folder = tmp_path_factory.mktemp("no-confidence")
    checkpoint = Path(shutil.copytree(Path(__file__).parent / "data/demo_pair/vanilla", folder / "checkpoint"))
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    config["enable_confidence_head"] = False
    (checkpoint / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for path in checkpoint.glob("*.safetensors"):
        drop_tensors(path, "confidence_head.")
    convert(ConvertOptions(checkpoint, demo_target, folder / "drafter.gguf", "q8_0"))
    return folder / "drafter.gguf"


def drop_tensors(path: Path, prefix: str) -> None:
    """Rewrite a safetensors file without the tensors whose names begin so."""
    raw = path.read_bytes()
    n_header = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + n_header]), raw[8 + n_header :]
    kept: dict[str, Any] = {}
    parts: list[bytes] = []
    for name, info in header.items():
        if name == "__metadata__":
            kept[name] = info
        elif not name.startswith(prefix):
            begin, end = info["data_offsets"]
            at = sum(map(len, parts))
            kept[name] = info | {"data_offsets": [at, at + end - begin]}
            parts.append(data[begin:end])
    text = json.dumps(kept).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts))


def dequantize(source: Path, destination: Path) -> Path:
    """Write `source` again with every float tensor in 32-bit floats."""
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(destination, arch=reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        copy_field(gguf, writer, field)
    for tensor in reader.tensors:
        is_integer = tensor.tensor_type.name in ("I8", "I16", "I32", "I64")
        writer.add_tensor(
            tensor.name, tensor.data if is_integer else gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return destination


def copy_field(gguf: Any, writer: Any, field: Any) -> None:
    """Copy one metadata entry, but for those the writer makes itself and the file type, which changes."""
    if field.name.startswith("GGUF.") or field.name == "general.architecture":
        return
    if field.name == "general.file_type":
        writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        return
    kind = field.types[0]
    element = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
    writer.add_key_value(field.name, field.contents(), kind, element)


def rewrite(source: Path, destination: Path, changes: Mapping[str, int], **options: int) -> Path:
    """Write a GGUF file again with some integers changed or added; `options` of the writer may split it."""
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(destination, arch=reader.fields["general.architecture"].contents(), **options)
    for field in reader.fields.values():
        if field.name == "general.file_type":
            writer.add_file_type(field.contents())
        elif field.name not in changes:
            copy_field(gguf, writer, field)
    for name, value in changes.items():
        writer.add_uint32(name, value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return destination
