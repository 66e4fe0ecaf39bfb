"""What the C library keeps of freed memory, given back to the system."""

from __future__ import annotations

import ctypes

__all__ = ["return_free_memory"]


def return_free_memory() -> None:
    """Give the system what the allocator holds and nobody uses; does nothing where the C library is not glibc.

    Models are loaded in several threads, glibc has an arena for each, and an arena keeps what was freed in it: some
    80 MiB of the bundled pair. A server that switches between models would hold that many times over.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # other C libraries have no such call, Windows no such handle
        return
