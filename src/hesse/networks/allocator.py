"""Settings of the C allocator, so that freed memory returns to the system."""

import ctypes
import sys
from typing import Any

MMAP_THRESHOLD = -3  # the option's number in malloc.h
LARGE_BYTES = 1 << 22


def give_back_memory() -> None:
    """Ask the C library to return freed memory to the system; by default it keeps most of it."""
    trim = _allocator("malloc_trim")
    if trim is not None:
        trim(0)


def keep_no_large_memory() -> None:
    """Make the C library map each large allocation separately, so that it returns to the system when freed.

    Otherwise freed pieces stay in the process and may not fit later allocations: a quarter more memory was measured.
    """
    option = _allocator("mallopt")
    if option is not None:
        option(MMAP_THRESHOLD, LARGE_BYTES)


def _allocator(name: str) -> Any:
    """Return a function of the GNU C library; None with another library."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
