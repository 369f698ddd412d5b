"""Rounding in the kernels, bit for bit that of `Grid.codes` and `Grid.values`."""

from typing import Any

import torch
import triton
import triton.language as tl

# The compiler may join no product and sum but those written as tl.fma: the value of a code is its *rounded* product.
EXACT = {"enable_fp_fusion": False}


def stored_type(dtype: torch.dtype) -> Any:
    """`dtype` as the kernels name it; one that keeps all of a float32 is the same to them as that."""
    return {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}.get(dtype, tl.float32)


@triton.jit
def nearest(steps, lowest, highest):
    """Return the whole numbers in [lowest, highest] nearest to `steps`, ties to even."""
    clamped = tl.minimum(tl.maximum(steps, lowest), highest)
    # Numbers as large as 1.5 · 2^23 have no room for a fraction, so that the sum is rounded.
    return (clamped + 12582912.0) - 12582912.0


@triton.jit
def stored(value, dtype: tl.constexpr):
    """`value` rounded to the stored type and back to float32."""
    if dtype == tl.bfloat16:  # by its bits, since Triton's interpreter cuts them off
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        value = bits.to(tl.float32, bitcast=True)
    elif dtype == tl.float16:
        value = value.to(tl.float16).to(tl.float32)
    return value
