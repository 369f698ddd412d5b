"""Coordinate descent on the codes of single rows, compiled, until no single change lowers a row's cost."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hesse.compiled import Floats, compile_loop, lost_bits, round_stored
from hesse.constraints import Grid, GridCode
from hesse.curvature import Gram

MOST_PASSES = 200  # over a row; more than any row was observed to need


def settle_rows(code: GridCode, gram: Gram, grid: Grid, weight: Tensor) -> GridCode:
    """Return codes after coordinate descent on each row's ½ d A dᵀ from those of `code`, with the same scales.

    Column after column a code is set to the best value, until a pass changes none: then no change of a single code
    lowers the cost. In float64, on the CPU.
    """
    columns, scales = weight.shape[1], code.scales
    scale, offset = (grid.expand(each, columns).float().cpu().contiguous() for each in (scales.scale, scales.zeros))
    moment = gram.second_moment.double().cpu().contiguous()
    difference = (grid.decode(code).double() - weight.double()).cpu()
    codes = (code.codes.float().cpu() - offset).contiguous()
    _settle(
        codes.numpy(),
        (difference @ moment).numpy(),
        scale.numpy(),
        (grid.lowest - offset).numpy(),
        (grid.highest - offset).numpy(),
        moment.numpy(),
        lost_bits(grid.dtype),
    )
    return GridCode((codes + offset).to(torch.int8).to(code.codes.device), scales)


@compile_loop
def _settle(
    codes: Floats,
    slope: NDArray[np.float64],
    scale: Floats,
    lowest: Floats,
    highest: Floats,
    moment: NDArray[np.float64],
    lost: np.uint32,
) -> None:
    """All are (out, in), `slope` being A d; `codes` are changed in place, and `slope` with them."""
    rows, columns = codes.shape
    for i in range(rows):
        for _ in range(MOST_PASSES):
            changed = False
            for j in range(columns):
                own = moment[j, j]
                if own <= 0:
                    continue
                value = round_stored(np.float32(codes[i, j] * scale[i, j]), lost)
                wanted = np.rint((value - slope[i, j] / own) / scale[i, j])
                code = np.float32(min(max(wanted, lowest[i, j]), highest[i, j]))
                change = np.float64(round_stored(np.float32(code * scale[i, j]), lost)) - value
                gain = change * (slope[i, j] + 0.5 * own * change)
                if gain < -1e-12 * own * scale[i, j] * scale[i, j]:
                    codes[i, j] = code
                    changed = True
                    for k in range(columns):
                        slope[i, k] += change * moment[j, k]
            if not changed:
                break
