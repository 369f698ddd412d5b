"""What the C library does with memory that was freed, so that a process takes no more than it needs."""

import ctypes
import sys
from typing import Any

MMAP_THRESHOLD = -3  # the option's number in malloc.h
LARGE_BYTES = 1 << 22


def give_back_memory() -> None:
    """Let the C library give memory that was freed back to the system, where it can; it keeps most of it otherwise."""
    trim = _allocator("malloc_trim")
    if trim is not None:
        trim(0)


def keep_no_large_memory() -> None:
    """From now on let the C library take large memory from the system each time, and give it back when it is freed.

    Otherwise it keeps what it once had, in pieces that may not fit what comes next: more memory by a quarter was seen.
    """
    option = _allocator("mallopt")
    if option is not None:
        option(MMAP_THRESHOLD, LARGE_BYTES)


def _allocator(name: str) -> Any:
    """A function of the GNU C library; None under another."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
