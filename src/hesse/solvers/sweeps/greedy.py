"""Optimal Brain Surgeon one weight at a time, compiled: the next weight depends on what the last one changed."""

import numpy as np
from numpy.typing import NDArray

from hesse.compiled import Floats, add, compile_loop, round_stored

SMALLEST = np.float32(1e-30)  # what a pivot counts as that rounding has taken below zero: its weight comes last


@compile_loop
def _eliminate(inverse: Floats, p: int) -> None:
    """Take weight `p` out of H⁻¹ (n, n) by a step of Gauss, which leaves the inverse of H without row and column p."""
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
    """w_Qᵀ ([H⁻¹]_QQ)⁻¹ w_Q of the neighbours Q from `first` on, by steps of Gauss in `work` (size, size + 1)."""
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
def prune(
    weights: Floats, inverses: Floats, group: int, kept: int, block: int, costs: Floats, turns: NDArray[np.int32]
) -> None:
    """Drop the weights of each row (rows, n), cheapest first, each time making good what that costs.

    `inverses` (1 or rows, n, n) are H⁻¹ of all rows or of each. With `group` not 0, of each `group` neighbours `kept`
    are; with `block` above 1 so many neighbours go together. `costs` (rows, n / block) get what each drop adds to
    ½ dᵀHd, in the order of dropping, and `turns` the turn in which a weight is dropped, n for one that is not.
    `weights` end as they are when all of these are gone.
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
    """Round the weights of each row (rows, n) one at a time, the one that costs least first, the others making it good.

    One that has come to lie further than half a step from its grid is rounded at once, before it goes further.
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
