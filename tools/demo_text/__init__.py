"""The generated text that the demo pair is trained on.

Three domains, each a function ``sample(rng) -> Dialogue``: worked arithmetic, small Python functions, and chat.
Everything is written by templates in this folder, so the text may be shipped with the models. A twentieth of the
questions (chosen by their hash) is held out of training and serves as prompts.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable

from . import arithmetic, chat, code
from .dialogue import Dialogue

IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
END_OF_TEXT = "<|endoftext|>"

SAMPLERS: dict[str, Callable[[random.Random], Dialogue]] = {
    "arithmetic": arithmetic.sample,
    "code": code.sample,
    "chat": chat.sample,
}
DOMAINS = tuple(SAMPLERS)
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a friendly assistant. Answer clearly and step by step.",
    "Be brief and precise.",
)

# One document in ten opens with a system prompt, one in twenty-five is bare text without chat markers.
SYSTEM_SHARE = 0.10
BARE_SHARE = 0.04
HELD_OUT_ONE_IN = 20


def is_held_out(question: str) -> bool:
    """Tell whether a question is kept out of the training text."""
    digest = hashlib.sha256(question.encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0


def render_prompt(question: str, system: str | None = None) -> str:
    """Render one user turn in ChatML, ending where the assistant's answer begins."""
    opening = f"{IM_START}system\n{system}{IM_END}\n" if system else ""
    return f"{opening}{IM_START}user\n{question}{IM_END}\n{IM_START}assistant\n"


def sample_training_dialogue(rng: random.Random, domain: str) -> Dialogue:
    """Draw a dialogue whose question is not held out."""
    while True:
        dialogue = SAMPLERS[domain](rng)
        if not is_held_out(dialogue.question):
            return dialogue


def sample_document(rng: random.Random, domain: str) -> str:
    """Draw one training document: usually a ChatML dialogue, now and then the bare answer."""
    dialogue = sample_training_dialogue(rng, domain)
    form = rng.random()
    if form < BARE_SHARE:
        return f"{dialogue.answer}{END_OF_TEXT}"
    system = rng.choice(SYSTEM_PROMPTS) if form < BARE_SHARE + SYSTEM_SHARE else None
    return f"{render_prompt(dialogue.question, system)}{dialogue.answer}{IM_END}\n"


def sample_held_out(rng: random.Random, domain: str, n_prompts: int) -> list[Dialogue]:
    """Draw distinct held-out dialogues of one domain."""
    found: dict[str, Dialogue] = {}
    while len(found) < n_prompts:
        dialogue = SAMPLERS[domain](rng)
        if is_held_out(dialogue.question):
            found.setdefault(dialogue.question, dialogue)
    return list(found.values())


__all__ = [
    "DOMAINS",
    "END_OF_TEXT",
    "IM_END",
    "IM_START",
    "SYSTEM_PROMPTS",
    "Dialogue",
    "is_held_out",
    "render_prompt",
    "sample_document",
    "sample_held_out",
    "sample_training_dialogue",
]
