"""Exact weighted k-means on a line, compiled: dynamic programming over all ends of a part."""

import numpy as np
from numpy.typing import NDArray

from hesse.compiled import compile_loop

Doubles = NDArray[np.float64]


@compile_loop
def _cost(mass: Doubles, first: Doubles, second: Doubles, start: int, stop: int) -> float:
    """Return Σ m (w - mean)² of the numbers [start, stop), from sums of m, m w and m w² up to each."""
    weight = mass[stop] - mass[start]
    if weight <= 0:
        return 0.0
    moment = first[stop] - first[start]
    cost: float = max(second[stop] - second[start] - moment * moment / weight, 0.0)
    return cost


@compile_loop
def best_means(numbers: Doubles, masses: Doubles, means: Doubles) -> None:
    """Fill `means` (rows, k) with the values v of least Σ m (w - v)² for each row of numbers w.

    `numbers` w ascend (rows, n); `masses` m ≥ 0 (rows, n).

    Dynamic programming over the sorted numbers: the best cut before `stop` never moves back as `stop` advances (the
    cost is concave Monge), so each part is filled by divide and conquer: rows · k · n · log n operations. Source: Wu,
    1991; Grønlund et al., 2017 (arXiv:1701.07204).
    """
    rows, n = numbers.shape
    k = means.shape[1]
    mass, first, second = np.zeros(n + 1), np.zeros(n + 1), np.zeros(n + 1)
    cuts = np.zeros((k, n + 1), np.int64)
    before, after = np.empty(n + 1), np.empty(n + 1)
    stack = np.empty((2 * n + 64, 4), np.int64)
    for row in range(rows):
        for j in range(n):
            m, w = masses[row, j], numbers[row, j]
            mass[j + 1] = mass[j] + m
            first[j + 1] = first[j] + m * w
            second[j + 1] = second[j] + m * w * w
        for stop in range(n + 1):
            before[stop] = _cost(mass, first, second, 0, stop)
        for part in range(1, k):
            stack[0] = 0, n, 0, n  # stops from, to; cuts from, to
            depth = 1
            while depth:
                depth -= 1
                low, high, left, right = stack[depth]
                stop = (low + high) // 2
                best, place = np.inf, left
                for cut in range(left, min(stop, right) + 1):
                    total = before[cut] + _cost(mass, first, second, cut, stop)
                    if total < best:
                        best, place = total, cut
                after[stop], cuts[part, stop] = best, place
                if low < stop:
                    stack[depth] = low, stop - 1, left, place
                    depth += 1
                if stop < high:
                    stack[depth] = stop + 1, high, place, right
                    depth += 1
            before[:] = after
        stop = n
        for part in range(k - 1, -1, -1):
            start = cuts[part, stop] if part else 0
            weight = mass[stop] - mass[start]
            if weight > 0:
                means[row, part] = (first[stop] - first[start]) / weight
            else:
                means[row, part] = numbers[row, min(start, n - 1)]
            stop = start
