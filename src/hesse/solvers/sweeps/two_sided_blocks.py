"""The inner loops of two-sided rounding, compiled, since each code depends on the one before it.

Each loop takes a block of a weight's columns, transposed so that a column is contiguous: weights (columns, out). The
last arguments are the allowed values: scales and the lowest and highest codes of each weight's group (columns, out) and
the bits lost in storage, or in the loops ending in `_table` the ascending values of each row (out, k).
"""

import numpy as np

from hesse.compiled import Floats, add, compile_loop, round_stored


@compile_loop
def feed_back(
    work: Floats,
    codes: Floats,
    errors: Floats,
    spread: Floats,
    columns: Floats,
    rows: Floats,
    scale: Floats,
    lowest: Floats,
    highest: Floats,
    lost: np.uint32,
) -> None:
    """Error feedback over the columns of a block and, within a column, over some of its rows.

    `work` is overwritten, `codes` and `errors` are filled; `spread` holds the corrections from the errors of earlier
    rows, and the block's own are added to it. `columns` (columns, columns) and `rows` (rows, rows) are upper
    triangular with unit diagonal: the error e of weight (j, i) takes columns[j, k] · rows[i, l] · e from weight (k, l),
    k ≥ j, l ≥ i.
    """
    width, height = work.shape
    for j in range(width):
        weight, taken = work[j], spread[j]
        for i in range(height):
            wanted, s = weight[i] - taken[i], scale[j, i]
            code = min(max(np.rint(wanted / s), lowest[j, i]), highest[j, i])
            codes[j, i] = code
            errors[j, i] = np.float32(wanted - round_stored(np.float32(code * s), lost))
            add(taken[i:], rows[i, i:], errors[j, i])
        for k in range(j + 1, width):
            add(work[k], taken, -columns[j, k])


@compile_loop
def descend(
    codes: Floats,
    gradient: Floats,
    changes: Floats,
    input_factor: Floats,
    output_factor: Floats,
    scale: Floats,
    lowest: Floats,
    highest: Floats,
    lost: np.uint32,
) -> None:
    """Coordinate descent on ½ tr(G d A dᵀ), once over the codes of a block, which are changed in place.

    `gradient` is (A d G) for the present difference d, and overwritten; `changes` is filled with the changes of the
    weights times G. `input_factor` is A (columns, columns) of the block, `output_factor` G (out, out). A code changes
    only where that lowers the cost.
    """
    width, height = codes.shape
    for j in range(width):
        slope, moved, own = gradient[j], changes[j], input_factor[j, j]
        moved[:] = 0
        for i in range(height):
            curvature = output_factor[i, i] * own
            s, before = scale[j, i], codes[j, i]
            value = round_stored(np.float32(before * s), lost)
            steepness = slope[i] + own * moved[i]
            code = min(max(np.rint((value - steepness / curvature) / s), lowest[j, i]), highest[j, i])
            change = np.float32(round_stored(np.float32(code * s), lost) - value)
            if change * (steepness + np.float32(0.5) * curvature * change) < 0:
                codes[j, i] = code
                add(moved, output_factor[i], change)
        for k in range(j + 1, width):
            add(gradient[k], moved, input_factor[j, k])


@compile_loop
def nearest(values: Floats, wanted: np.float32) -> int:
    """Return the index of the nearest of ascending `values`; of two equally near the higher."""
    low, high = 0, len(values) - 1
    while low < high:
        middle = (low + high) // 2
        if wanted < np.float32(0.5) * (values[middle] + values[middle + 1]):
            high = middle
        else:
            low = middle + 1
    return low


@compile_loop
def feed_back_table(
    work: Floats, codes: Floats, errors: Floats, spread: Floats, columns: Floats, rows: Floats, values: Floats
) -> None:
    """Feed errors back as `feed_back` does, on tables."""
    width, height = work.shape
    for j in range(width):
        weight, taken = work[j], spread[j]
        for i in range(height):
            wanted = weight[i] - taken[i]
            code = nearest(values[i], wanted)
            codes[j, i] = np.float32(code)
            errors[j, i] = wanted - values[i, code]
            add(taken[i:], rows[i, i:], errors[j, i])
        for k in range(j + 1, width):
            add(work[k], taken, -columns[j, k])


@compile_loop
def descend_table(
    codes: Floats,
    gradient: Floats,
    changes: Floats,
    input_factor: Floats,
    output_factor: Floats,
    values: Floats,
) -> None:
    """Descend as `descend` does, on tables."""
    width, height = codes.shape
    for j in range(width):
        slope, moved, own = gradient[j], changes[j], input_factor[j, j]
        moved[:] = 0
        for i in range(height):
            curvature = output_factor[i, i] * own
            value = values[i, int(codes[j, i])]
            steepness = slope[i] + own * moved[i]
            code = nearest(values[i], value - steepness / curvature)
            change = values[i, code] - value
            if change * (steepness + np.float32(0.5) * curvature * change) < 0:
                codes[j, i] = np.float32(code)
                add(moved, output_factor[i], change)
        for k in range(j + 1, width):
            add(gradient[k], moved, input_factor[j, k])
