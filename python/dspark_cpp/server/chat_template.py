"""A template that knows tools, for models whose own does not.

ChatML is what such a model has learned; the way to describe and call tools is the one of Hermes and Qwen, which
llama.cpp can read. How well a model calls tools that it has never been taught is another question.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["TOOLS_TEMPLATE", "can_borrow_tools"]

TOOLS_TEMPLATE = Path(__file__).with_name("chatml_tools.jinja").read_text(encoding="utf-8")


def can_borrow_tools(template: str) -> bool:
    """Whether a template is ChatML, so that `TOOLS_TEMPLATE` can stand in for it."""
    return "<|im_start|>" in template
