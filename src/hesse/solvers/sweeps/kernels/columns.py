"""Error feedback over the columns of one block, for all outputs in parallel.

Each program holds the block's columns of some outputs and walks over them, so that a block costs one launch and its
weights are read and written once. Outputs do not depend on one another; a column depends on all before it.
"""

import torch
import triton
import triton.language as tl

from hesse.constraints import Grouped
from hesse.solvers.sweeps.columns import ColumnBlock, bounds_of
from hesse.solvers.sweeps.kernels.rounding import EXACT, nearest, stored, stored_type

HELD = 4096  # weights that one program holds


@triton.jit(do_not_specialize=["first", "last"])
def _walk(
    work, errors, codes, scale, zero_point, kept, update, width, height, first, last, lowest, highest,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    row_inside, column_inside = rows < height, columns < width
    places = columns[:, None] * height + rows[None, :]
    inside = column_inside[:, None] & row_inside[None, :]
    held = tl.load(work + places, mask=inside, other=0.0)
    for j in range(first, last):
        at = j * height + rows
        here = columns[:, None] == j
        weight = tl.sum(tl.where(here, held, 0.0), 0)
        allowed = weight
        if kept is not None:
            allowed = tl.where(tl.load(kept + at, mask=row_inside, other=1) != 0, weight, 0.0)
        if scale is not None:
            step = tl.load(scale + at, mask=row_inside, other=1.0)
            steps = tl.div_rn(allowed, step)
            if zero_point is not None:
                zero = tl.load(zero_point + at, mask=row_inside, other=0.0)
                code = nearest(steps + zero, lowest, highest)
                allowed = stored((code - zero) * step, dtype)
            else:
                code = nearest(steps, lowest, highest)
                allowed = stored(code * step, dtype)
            tl.store(codes + at, code.to(tl.int8), mask=row_inside)
        error = weight - allowed
        tl.store(errors + at, error, mask=row_inside)
        taken = tl.load(update + j * width + columns, mask=column_inside, other=0.0)
        updated = tl.fma(-taken[:, None], error[None, :], held)
        held = tl.where(here, allowed[None, :], tl.where(columns[:, None] > j, updated, held))
    tl.store(work + places, held, mask=inside)


def walk(block: ColumnBlock, first: int, last: int, grid: Grouped | None) -> None:
    """Implement `sweeps.columns.walk` on a GPU."""
    width, height = block.work.shape
    padded = triton.next_power_of_2(width)
    rows = max(HELD // padded, 1)
    with torch.cuda.device_of(block.work):
        _walk[(triton.cdiv(height, rows),)](
            block.work, block.errors, block.codes, block.scale, block.zero_point,
            None if block.kept is None else block.kept.view(torch.int8),
            block.update, width, height, first, last,
            *map(float, bounds_of(grid)),
            WIDTH=padded, ROWS=rows, dtype=stored_type(grid.dtype if grid else torch.float32), **EXACT,
        )  # fmt: skip
