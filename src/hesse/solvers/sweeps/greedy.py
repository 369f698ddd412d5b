"""Optimal Brain Surgeon one weight at a time, compiled, since each choice depends on the last update."""

import numpy as np
from numpy.typing import NDArray

from hesse.compiled import Floats, add, compile_loop, round_stored

SMALLEST = np.float32(1e-30)  # replaces a pivot that rounding made negative: its weight comes last


@compile_loop
def _eliminate(inverse: Floats, p: int) -> None:
    """Remove weight `p` from H⁻¹ (n, n) by Gaussian elimination, leaving the inverse of H without row and column p."""
    pivot = inverse[p].copy()
    if pivot[p] < SMALLEST:
        pivot[p] = SMALLEST
    for i in range(len(inverse)):
        if pivot[i] != 0:
            add(inverse[i], pivot, np.float32(-pivot[i] / pivot[p]))
    inverse[p] = 0
    inverse[:, p] = 0


@compile_loop
def _price(weight: Floats, inverse: Floats, first: int, work: Floats) -> np.float32:
    """Return w_Qᵀ ([H⁻¹]_QQ)⁻¹ w_Q of the neighbors Q from `first` on, by elimination in `work` (size, size + 1)."""
    size = len(work)
    for i in range(size):
        work[i, size] = weight[first + i]
        for j in range(size):
            work[i, j] = inverse[first + i, first + j]
    total: np.float32 = np.float32(0)
    for k in range(size):
        pivot = max(work[k, k], SMALLEST)
        total += work[k, size] * work[k, size] / pivot
        for i in range(k + 1, size):
            add(work[i], work[k], np.float32(-work[i, k] / pivot))
    return total


@compile_loop
def remove_from_rows(
    weights: Floats, inverses: Floats, group: int, kept: int, block: int, costs: Floats, turns: NDArray[np.int32]
) -> None:
    """Drop the weights of each row (rows, n), cheapest first, updating the others each time.

    `inverses` (1 or rows, n, n) are H⁻¹ of all rows or of each. If `group` is not 0, `kept` of every `group` neighbors
    stay; with `block` above 1, that many neighbors are dropped together. `costs` (rows, n / block) receive the increase
    of ½ dᵀHd by each drop, in order, and `turns` the turn in which a weight is dropped, n for one that stays. `weights`
    end with all drops applied.
    """
    rows, n = weights.shape
    work = np.empty((block, block + 1), np.float32)
    left = np.empty(n // group if group else 1, np.int64)
    for row in range(rows):
        weight, inverse = weights[row], inverses[row if len(inverses) > 1 else 0].copy()
        left[:] = group - kept if group else n
        turns[row] = n
        drops = len(left) * (group - kept) if group else n // block
        for turn in range(drops):
            best, cheapest = -1, np.float32(np.inf)
            for p in range(0, n, block):
                if turns[row, p] == n and left[p // group if group else 0] > 0:
                    if block == 1:
                        price = weight[p] * weight[p] / max(inverse[p, p], SMALLEST)
                    else:
                        price = _price(weight, inverse, p, work)
                    if best < 0 or price < cheapest:
                        best, cheapest = p, price
            costs[row, turn] = np.float32(0.5) * cheapest
            left[best // group if group else 0] -= 1
            for p in range(best, best + block):  # one by one comes to the same as together
                turns[row, p] = turn
                add(weight, inverse[p], np.float32(-weight[p] / max(inverse[p, p], SMALLEST)))
                weight[p] = 0
                _eliminate(inverse, p)


@compile_loop
def round_all(
    weights: Floats,
    inverse: Floats,
    scale: Floats,
    zero_point: Floats,
    lowest: np.float32,
    highest: np.float32,
    lost: np.uint32,
    codes: NDArray[np.int8],
) -> None:
    """Round the weights of each row (rows, n) one at a time, cheapest first, updating the others each time.

    A weight more than half a step off its grid is rounded immediately, before it moves further.
    """
    rows, n = weights.shape
    for row in range(rows):
        weight, own = weights[row], inverse.copy()
        done = np.zeros(n, np.bool_)
        for _ in range(n):
            best, cheapest, nearest, code_of_best = -1, np.float32(np.inf), np.float32(0), np.float32(0)
            for p in range(n):
                if done[p]:
                    continue
                step, zero = scale[row, p], zero_point[row, p]
                code = min(max(np.rint(np.float32(weight[p] / step) + zero), lowest), highest)
                value = round_stored(np.float32((code - zero) * step), lost)
                error = weight[p] - value
                price = error * error / max(own[p, p], SMALLEST)
                if abs(error) > abs(step) * np.float32(0.5001):
                    price = -price  # out of range: at once, the furthest first
                if best < 0 or price < cheapest:
                    best, cheapest, nearest, code_of_best = p, price, value, code
            codes[row, best] = np.int8(code_of_best)
            add(weight, own[best], np.float32(-(weight[best] - nearest) / max(own[best, best], SMALLEST)))
            weight[best] = nearest
            done[best] = True
            _eliminate(own, best)
