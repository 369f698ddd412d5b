"""Shared by compiled loops: the compiler, and rounding to a stored type.

The compiler (numba) caches machine code next to the loop's file or in the user's cache folder; the very first call
takes seconds.
"""

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import numba
import numpy as np
import torch
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Arguments = ParamSpec("Arguments")
LoopResult = TypeVar("LoopResult")


def compile_loop(loop: Callable[Arguments, LoopResult]) -> Callable[Arguments, LoopResult]:
    """Compile `loop` to machine code, cached for the next process where a folder can be written."""
    machine_code: Any
    try:
        machine_code = numba.njit(cache=True, nogil=True)(loop)
    except RuntimeError:  # no folder that can be written
        machine_code = numba.njit(nogil=True)(loop)
    return cast(Callable[Arguments, LoopResult], machine_code)


def lost_bits(dtype: torch.dtype) -> np.uint32:
    """Return how many of a float32's last bits a number of type `dtype` lacks: none if it is as precise or more."""
    return cast(np.uint32, np.uint32(max(round(np.log2(torch.finfo(dtype).eps)) + 23, 0)))


@compile_loop
def round_stored(value: np.float32, lost: np.uint32) -> np.float32:
    """Return `value` rounded to the precision of the stored type, ties to even; `lost` 0 returns it unchanged."""
    if not lost:
        return value
    bits, one = np.float32(value).view(np.uint32), np.uint32(1)
    below_half = (one << (lost - one)) - one
    rounded: np.float32 = np.uint32((bits + below_half + ((bits >> lost) & one)) >> lost << lost).view(np.float32)
    return rounded


@compile_loop
def add(target: Floats, values: Floats, factor: np.float32) -> None:
    """Add `factor` times `values` to `target`."""
    for k in range(len(target)):
        target[k] += factor * values[k]
