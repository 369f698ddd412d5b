"""Both sweeps of two-sided rounding; `hesse.solvers.sweeps.two_sided` says what they do.

Feedback: a weight depends on those of no later column and no later row, so a weight is cut into tiles, and the tiles
of one anti-diagonal are solved by one launch, a program each. Within a tile the weights of an anti-diagonal are
rounded together. For n columns and m rows that is (n + m) / TILE launches of 2 · TILE steps, n + m in all being the
longest chain of weights that depend on one another.

Descent: a weight depends on all before it, since G has no zeros. But it is only a *change* of a code that others
depend on, and few change (1 or 2 in a hundred): a program weighs many codes of a column together, makes the first
change, and weighs those after it again. The longest chain is as long as there are changes, and one program walks it,
so that descent is expected to take longest (not measured).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hesse.solvers.sweeps.kernels.rounding import EXACT, nearest, stored, stored_type
from hesse.solvers.sweeps.two_sided import DESCENT_COLUMNS, GridLevels

TILE = 64  # columns and rows that one program solves
CHUNK = 512  # rows that descent weighs together
DEPTH = 16  # of the products that bring errors to a tile, as many as fit registers


@triton.jit(do_not_specialize=["diagonal", "leftmost"])
def _solve_tiles(
    work, spread, errors, codes, scale, lowest, highest, group, columns, rows, width, height, diagonal, leftmost,
    TILE: tl.constexpr, DEPTH: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Solve the tiles of one anti-diagonal: all that is read of other tiles is of earlier ones.

    `errors` (in, out) are those of single weights, `spread` = errors · rows those that later columns are to take.
    """
    left = (leftmost + tl.program_id(0)) * TILE
    top = (diagonal - leftmost - tl.program_id(0)) * TILE
    across, down, deep = tl.arange(0, TILE), tl.arange(0, TILE), tl.arange(0, DEPTH)
    column, row = left + across, top + down
    column_inside, row_inside = column < width, row < height
    inside = column_inside[:, None] & row_inside[None, :]
    places = column[:, None].to(tl.int64) * height + row[None, :]
    held = tl.load(work + places, mask=inside, other=0.0)
    for start in range(0, left, DEPTH):
        factor = tl.load(
            columns + (start + deep)[None, :].to(tl.int64) * width + column[:, None], mask=column_inside[:, None],
            other=0.0,
        )  # fmt: skip
        given = tl.load(
            spread + (start + deep)[:, None].to(tl.int64) * height + row[None, :], mask=row_inside[None, :], other=0.0
        )
        held -= tl.dot(factor, given, input_precision="ieee")
    gathered = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, top, DEPTH):
        factor = tl.load(
            rows + (start + deep)[:, None].to(tl.int64) * height + row[None, :], mask=row_inside[None, :], other=0.0
        )
        given = tl.load(
            errors + column[:, None].to(tl.int64) * height + (start + deep)[None, :], mask=column_inside[:, None],
            other=0.0,
        )  # fmt: skip
        gathered += tl.dot(given, factor, input_precision="ieee")

    for step in range(2 * TILE - 1):
        # Of each row one weight is rounded, in column step - down; seen from a column, in row step - across.
        here = across[:, None] + down[None, :] == step
        its_column, its_row = left + step - down, top + step - across
        column_on = (step >= down) & (step - down < TILE) & (its_column < width)
        row_on = (step >= across) & (step - across < TILE) & (its_row < height)
        on = column_on & row_inside
        at = its_column.to(tl.int64) * height + row
        line = tl.load(group + its_column, mask=on, other=0) * height + row
        row_factor = tl.load(
            rows + its_row[:, None].to(tl.int64) * height + row[None, :], mask=row_on[:, None] & row_inside[None, :],
            other=0.0,
        )  # fmt: skip
        later = column_inside[:, None] & (column[:, None] > its_column[None, :])
        column_factor = tl.load(
            columns + its_column[None, :].to(tl.int64) * width + column[:, None], mask=column_on[None, :] & later,
            other=0.0,
        )  # fmt: skip
        size = tl.load(scale + line, mask=on, other=1.0)
        low = tl.load(lowest + line, mask=on, other=0.0)
        high = tl.load(highest + line, mask=on, other=0.0)
        wanted = tl.sum(tl.where(here, held - gathered, 0.0), 0)
        code = nearest(tl.div_rn(wanted, size), low, high)
        error = tl.where(on, wanted - stored(code * size, dtype), 0.0)
        tl.store(codes + at, code, mask=on)
        tl.store(errors + at, error, mask=on)
        error_of_column = tl.sum(tl.where(here, error[None, :], 0.0), 1)
        gathered = tl.fma(row_factor, error_of_column[:, None], gathered)
        spread_of_row = tl.sum(tl.where(here, gathered, 0.0), 0)
        held = tl.fma(-column_factor, spread_of_row[None, :], held)
    tl.store(spread + places, gathered, mask=inside)


def feed_back(work: Tensor, steps: GridLevels, columns: Tensor, rows: Tensor) -> Tensor:
    """Implement `TwoSidedSweeps` on a GPU."""
    width, height = work.shape
    across, down = triton.cdiv(width, TILE), triton.cdiv(height, TILE)
    spread, errors, codes = (torch.empty_like(work) for _ in range(3))
    for diagonal in range(across + down - 1):
        leftmost = max(0, diagonal - down + 1)
        with torch.cuda.device_of(work):
            _solve_tiles[(min(diagonal, across - 1) - leftmost + 1,)](
                work, spread, errors, codes, steps.scale, steps.lowest, steps.highest, steps.group, columns, rows,
                width, height, diagonal, leftmost, TILE=TILE, DEPTH=DEPTH, dtype=stored_type(steps.dtype),
                num_warps=8, **EXACT,
            )  # fmt: skip
    return codes


@triton.jit(do_not_specialize=["width"])
def _descend(
    codes, gradient, changes, scale, lowest, highest, group, inputs, outputs, stride, width, height,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """One program's walk over a block of `width` columns; `CHUNK` rows of a column are weighed together."""
    lane, chunks = tl.arange(0, CHUNK), tl.arange(0, CHUNKS)
    all_rows = chunks[:, None] * CHUNK + lane[None, :]
    for j in range(width):
        own = tl.load(inputs + j * stride + j)
        moved = tl.zeros((CHUNKS, CHUNK), tl.float32)
        for chunk in range(CHUNKS):
            row = chunk * CHUNK + lane
            inside = row < height
            at = j * height + row
            line = tl.load(group + j) * height + row
            size = tl.load(scale + line, mask=inside, other=1.0)
            low = tl.load(lowest + line, mask=inside, other=0.0)
            high = tl.load(highest + line, mask=inside, other=0.0)
            code = tl.load(codes + at, mask=inside, other=0.0)
            curvature = tl.load(outputs + row.to(tl.int64) * (height + 1), mask=inside, other=1.0) * own
            slope = tl.load(gradient + at, mask=inside, other=0.0)
            for k in range(j):
                earlier = tl.load(changes + k * height + row, mask=inside, other=0.0)
                slope = tl.fma(earlier, tl.load(inputs + k * stride + j), slope)
            start = 0
            while start < CHUNK:
                value = stored(code * size, dtype)
                steepness = slope + own * tl.sum(tl.where(chunks[:, None] == chunk, moved, 0.0), 0)
                found = nearest(tl.div_rn(value - tl.div_rn(steepness, curvature), size), low, high)
                change = stored(found * size, dtype) - value
                cheaper = change * (steepness + 0.5 * curvature * change) < 0
                first = tl.min(tl.where(cheaper & inside & (lane >= start), lane, CHUNK), 0)
                here = lane == first
                code = tl.where(here, found, code)
                pulled = tl.load(
                    outputs + (chunk * CHUNK + first).to(tl.int64) * height + all_rows,
                    mask=(all_rows < height) & (first < CHUNK), other=0.0,
                )  # fmt: skip
                moved = tl.fma(pulled, tl.sum(tl.where(here, change, 0.0), 0), moved)
                start = first + 1
            tl.store(codes + at, code, mask=inside)
        tl.store(changes + j * height + all_rows, moved, mask=all_rows < height)
        tl.debug_barrier()  # before other threads read the changes


def descend(codes: Tensor, gradient: Tensor, steps: GridLevels, input_factor: Tensor, output_factor: Tensor) -> None:
    """Implement `TwoSidedSweeps` on a GPU."""
    width, height = codes.shape
    padded = triton.next_power_of_2(height)
    chunk = min(padded, CHUNK)
    for start in range(0, width, DESCENT_COLUMNS):
        stop = min(start + DESCENT_COLUMNS, width)
        changes = torch.empty_like(codes[start:stop])
        with torch.cuda.device_of(codes):
            _descend[(1,)](
                codes[start:stop], gradient[start:stop], changes, steps.scale, steps.lowest, steps.highest,
                steps.group[start:stop], input_factor[start:stop, start:stop], output_factor, input_factor.stride(0),
                stop - start, height, CHUNK=chunk, CHUNKS=padded // chunk, dtype=stored_type(steps.dtype), num_warps=8,
                **EXACT,
            )  # fmt: skip
        gradient[stop:].addmm_(input_factor[start:stop, stop:].T, changes)
