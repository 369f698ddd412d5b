"""The inner loops of two-sided rounding, compiled, since each code depends on the one before it.

Each loop takes a block of a weight's columns, transposed so that a column is contiguous: weights (columns, out). The
last arguments are the allowed values: of a grid scales and the lowest and highest codes of each weight's group
(columns, out) and the bits lost in storage, of a table the ascending values of each row (out, k). The others are None,
and the compiler leaves out the branches that read them.
"""

import numpy as np

from hesse.compiled import Floats, add, compile_loop, round_stored


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
def _nearest_code(
    wanted: np.float32,
    j: int,
    i: int,
    scale: Floats | None,
    lowest: Floats,
    highest: Floats,
    values: Floats | None,
) -> np.float32:
    """Return the code of the allowed value of weight (j, i) that is nearest to `wanted`."""
    code: np.float32 = np.float32(0)
    if scale is not None:
        code = min(max(np.rint(wanted / scale[j, i]), lowest[j, i]), highest[j, i])
    if values is not None:
        code = np.float32(nearest(values[i], wanted))
    return code


@compile_loop
def _value(
    code: np.float32, j: int, i: int, scale: Floats | None, lost: np.uint32, values: Floats | None
) -> np.float32:
    """Return the value of a code of weight (j, i), as it is stored."""
    value: np.float32 = np.float32(0)
    if scale is not None:
        value = round_stored(np.float32(code * scale[j, i]), lost)
    if values is not None:
        value = values[i, int(code)]
    return value


@compile_loop
def feed_back(
    work: Floats,
    codes: Floats,
    errors: Floats,
    spread: Floats,
    columns: Floats,
    rows: Floats,
    scale: Floats | None,
    lowest: Floats,
    highest: Floats,
    lost: np.uint32,
    values: Floats | None,
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
            wanted = weight[i] - taken[i]
            codes[j, i] = _nearest_code(wanted, j, i, scale, lowest, highest, values)
            errors[j, i] = np.float32(wanted - _value(codes[j, i], j, i, scale, lost, values))
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
    scale: Floats | None,
    lowest: Floats,
    highest: Floats,
    lost: np.uint32,
    values: Floats | None,
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
            value = _value(codes[j, i], j, i, scale, lost, values)
            steepness = slope[i] + own * moved[i]
            code = _nearest_code(value - steepness / curvature, j, i, scale, lowest, highest, values)
            change = np.float32(_value(code, j, i, scale, lost, values) - value)
            if change * (steepness + np.float32(0.5) * curvature * change) < 0:
                codes[j, i] = code
                add(moved, output_factor[i], change)
        for k in range(j + 1, width):
            add(gradient[k], moved, input_factor[j, k])
