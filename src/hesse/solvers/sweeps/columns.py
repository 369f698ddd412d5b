"""Error feedback over the columns of one block on a CPU, compiled: tensor operations per column cost more."""

from typing import NamedTuple

import numpy as np
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
