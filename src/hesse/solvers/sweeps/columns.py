"""Error feedback over columns: block by block, and within a block on a CPU by one compiled loop."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hesse.compiled import Floats, add, compile_loop, lost_bits, round_stored
from hesse.constraints import Grouped

TILE = 64  # outputs taken together, so that their columns of a block stay in the nearest cache


class ColumnBlock(NamedTuple):
    """A block of columns of a transposed weight, all (columns, out) and contiguous; None for parts it lacks."""

    work: Tensor  # weights in float32, replaced by allowed values
    errors: Tensor  # filled: weight - allowed value
    codes: Tensor | None  # filled, int8
    scale: Tensor | None
    zero_point: Tensor | None
    kept: Tensor | None  # bool
    update: (
        Tensor  # (columns, columns), contiguous: update[j, k] times the error of column j is taken from column k > j
    )


def walk(block: ColumnBlock, first: int, last: int, grid: Grouped | None) -> None:
    """Replace the columns [first, last) of `block` by allowed values; all columns after them take the errors.

    Where there is a `grid`, it has `bounds`.
    """
    lowest, highest = bounds_of(grid)
    empty = np.empty((0, 0), np.float32)
    codes, scale, zero_point, kept = (None if part is None else part.numpy() for part in block[2:6])
    _walk(
        block.work.numpy(),
        block.errors.numpy(),
        np.empty((0, 0), np.int8) if codes is None else codes,
        empty if scale is None else scale,
        empty if zero_point is None else zero_point,
        np.empty((0, 0), np.bool_) if kept is None else kept,
        block.update.numpy(),
        first,
        last,
        np.float32(lowest),
        np.float32(highest),
        np.uint32(0) if grid is None else lost_bits(grid.dtype),
    )


def bounds_of(grid: Grouped | None) -> tuple[int, int]:
    """Return the lowest and the highest code; 0 where there are no codes."""
    return (0, 0) if grid is None or grid.bounds is None else grid.bounds


@compile_loop
def _walk(
    work: Floats,
    errors: Floats,
    codes: NDArray[np.int8],
    scale: Floats,
    zero_point: Floats,
    kept: NDArray[np.bool_],
    update: Floats,
    first: int,
    last: int,
    lowest: np.float32,
    highest: np.float32,
    lost: np.uint32,
) -> None:
    """Implement `walk`; the parts that a block lacks are empty."""
    width, height = work.shape
    held = np.empty((width, TILE), np.float32)
    for top in range(0, height, TILE):
        rows = min(TILE, height - top)
        for j in range(first, width):
            held[j, :rows] = work[j, top : top + rows]
        for j in range(first, last):
            column, error = held[j], errors[j, top : top + rows]
            for i in range(rows):
                place, zero = top + i, np.float32(0)
                allowed = column[i] if len(kept) == 0 or kept[j, place] else zero
                if len(scale) > 0:
                    if len(zero_point) > 0:
                        zero = zero_point[j, place]
                    step = scale[j, place]
                    code = min(max(np.rint(np.float32(allowed / step) + zero), lowest), highest)
                    codes[j, place] = np.int8(code)
                    allowed = round_stored(np.float32((code - zero) * step), lost)
                error[i] = column[i] - allowed
                work[j, place] = allowed
            for k in range(j + 1, width):
                add(held[k, :rows], error, -update[j, k])
        for j in range(last, width):
            work[j, top : top + rows] = held[j, :rows]


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


def sweep_columns(work: Tensor, feedback: Tensor, block_size: int, allowed: Callable[[int, Tensor], Tensor]) -> None:
    """Replace each column j of `work` (in, out), after the errors of those before it, by `allowed(j, column)`."""

    def walk(start: int, stop: int, errors: Tensor, update: Tensor) -> None:
        for j in range(start, stop):
            found = allowed(j, work[j]).to(work.dtype)
            torch.sub(work[j], found, out=errors[j - start])
            work[j] = found
            work[j + 1 : stop].addr_(update[j - start, j - start + 1 :], errors[j - start], alpha=-1)

    sweep_blocks(work, feedback, block_size, walk)


def walk_by_operations(block: ColumnBlock, first: int, last: int, grid: Grouped | None) -> None:
    """Do what `walk` does by a few tensor operations a column, for weights of any type and any `grid`."""
    # Unbound once, since indexing a row of a tensor costs as much as computing with it.
    parts = ([None] * (last - first) if part is None else list(part[first:last]) for part in block)
    allowed, codes = [], []
    for j, (column, error, _, scale, zero_point, kept, update) in enumerate(zip(*parts, strict=True), first):
        values = column if kept is None else column * kept
        if grid is not None:
            codes.append(grid.codes(values, scale, zero_point))
            values = grid.values(codes[-1], scale, zero_point)
        allowed.append(values)
        left = len(block.work) - j - 1
        torch.sub(column, values, out=error)
        block.work.narrow(0, j + 1, left).addr_(update.narrow(0, j + 1, left), error, alpha=-1)
    torch.stack(allowed, out=block.work[first:last])
    if block.codes is not None:
        block.codes[first:last] = torch.stack(codes)
