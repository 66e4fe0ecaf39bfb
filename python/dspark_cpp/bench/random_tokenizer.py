"""A tokenizer of any size for files of random weights: the 256 bytes, filler, special tokens where Qwen3 has them."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

from dspark_cpp.convert.gguf_file import ValueType
from dspark_cpp.convert.gguf_writer import encode_value

__all__ = ["tokenizer_metadata"]

_SPECIAL = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645, "<|mask|>": 151669}
_NORMAL, _CONTROL = 1, 3
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def _special_ids(vocab_size: int) -> dict[str, int]:
    if vocab_size > max(_SPECIAL.values()):
        return _SPECIAL
    return {token: vocab_size - len(_SPECIAL) + i for i, token in enumerate(_SPECIAL)}


def _byte_characters() -> list[str]:
    """Return the characters that stand for the 256 bytes in byte-level BPE."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    rest = (byte for byte in range(256) if byte not in printable)
    table = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(rest)}
    return [table[byte] for byte in range(256)]


def tokenizer_metadata(vocab_size: int) -> dict[str, bytes]:
    """Return the tokenizer keys of a GGUF file, encoded; `vocab_size` must be at least 261."""
    ids = _special_ids(vocab_size)
    tokens = [*_byte_characters(), "\u0120t"]
    tokens += [f"t{i}" for i in range(len(tokens), vocab_size)]
    types = [_NORMAL] * vocab_size
    for token, at in ids.items():
        tokens[at], types[at] = token, _CONTROL
    values: dict[str, Any] = {
        "model": "gpt2",
        "pre": "qwen2",
        "token_type": types,
        "eos_token_id": ids["<|im_end|>"],
        "padding_token_id": ids["<|endoftext|>"],
        "mask_token_id": ids["<|mask|>"],
        "add_bos_token": False,
    }
    encoded = {f"tokenizer.ggml.{key}": encode_value(value) for key, value in values.items()}
    encoded["tokenizer.ggml.tokens"] = _encode_strings(tokens)
    encoded["tokenizer.ggml.merges"] = _encode_strings(["\u0120 t"])
    return encoded | {"tokenizer.chat_template": encode_value(_CHAT_TEMPLATE)}


def _encode_strings(texts: Sequence[str]) -> bytes:
    parts = [struct.pack("<IIQ", ValueType.ARRAY, ValueType.STRING, len(texts))]
    for text in texts:
        raw = text.encode()
        parts += [struct.pack("<Q", len(raw)), raw]
    return b"".join(parts)
