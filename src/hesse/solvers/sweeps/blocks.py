"""The sweep over blocks of columns that all error feedback shares."""

from collections.abc import Callable

import torch
from torch import Tensor

# Replaces the columns [start, stop) by allowed values and fills their errors, given how an error reaches later columns.
BlockWalk = Callable[[int, int, Tensor, Tensor], None]


def sweep_blocks(work: Tensor, feedback: Tensor, block_size: int, walk: BlockWalk) -> None:
    """Replace `work` (in, out) by allowed values, `block_size` columns at a time.

    The error of column j takes feedback[j, k] times itself from every later column k: `walk` does so within a block,
    one product for the whole block beyond it.
    """
    for start in range(0, len(work), block_size):
        stop = min(start + block_size, len(work))
        errors = torch.empty_like(work[start:stop])
        walk(start, stop, errors, feedback[start:stop, start:stop])
        work[stop:].addmm_(feedback[start:stop, stop:].T, errors, alpha=-1)
