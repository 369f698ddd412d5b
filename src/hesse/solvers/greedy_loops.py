"""Optimal Brain Surgeon one weight at a time, compiled: the next weight depends on what the last one changed."""

import numpy as np
from numpy.typing import NDArray

from hesse.compiled import Floats, add, compiled, stored

SMALLEST = np.float32(1e-30)  # what a pivot counts as that rounding has taken below zero: its weight comes last


@compiled
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


@compiled
def prune(weights: Floats, inverses: Floats, group: int, kept: int, costs: Floats, turns: NDArray[np.int32]) -> None:
    """Drop the weights of each row (rows, n), cheapest first, each time making good what that costs.

    `inverses` (1 or rows, n, n) are H⁻¹ of all rows or of each. With `group` not 0, of each `group` neighbours `kept`
    are. `costs` (rows, n) get what each drop adds to ½ dᵀHd, in the order of dropping, and `turns` the turn in which a
    weight is dropped, n for one that is not. `weights` end as they are when all of these are gone.
    """
    rows, n = weights.shape
    left = np.empty(n // group if group else 1, np.int64)
    for row in range(rows):
        weight, inverse = weights[row], inverses[row if len(inverses) > 1 else 0].copy()
        left[:] = group - kept if group else n
        turns[row] = n
        drops = len(left) * (group - kept) if group else n
        for turn in range(drops):
            best, cheapest = -1, np.float32(np.inf)
            for p in range(n):
                if turns[row, p] == n and left[p // group if group else 0] > 0:
                    price = weight[p] * weight[p] / max(inverse[p, p], SMALLEST)
                    if best < 0 or price < cheapest:
                        best, cheapest = p, price
            costs[row, turn] = np.float32(0.5) * cheapest
            turns[row, best] = turn
            left[best // group if group else 0] -= 1
            add(weight, inverse[best], np.float32(-weight[best] / max(inverse[best, best], SMALLEST)))
            weight[best] = 0
            _eliminate(inverse, best)


@compiled
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
                value = stored(np.float32((code - zero) * step), lost)
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
