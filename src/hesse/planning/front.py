"""Pareto front of size and predicted loss."""

from dataclasses import dataclass

import numpy as np

from hesse.planning.problem import Choice, Problem
from hesse.planning.solve import cheapest_within


@dataclass(frozen=True)
class FrontPoint:
    """Best choice within a size."""

    size: int  # bytes
    loss: float  # predicted, nats per token
    choice: Choice


def size_loss_front(problem: Problem, points: int) -> list[FrontPoint]:
    """Return the best choices within `points` sizes, in equal ratios from the smallest to the largest useful one.

    Sizes increase and losses decrease from one point to the next.
    """
    sizes = np.geomspace(problem.smallest, max(problem.largest, problem.smallest), points)
    front: list[FrontPoint] = []
    for size in [problem.smallest, *map(int, sizes[1:])]:
        choice = cheapest_within(problem, size)
        found = FrontPoint(problem.size(choice), problem.loss(choice), choice)
        if not front or (found.size > front[-1].size and found.loss < front[-1].loss):
            front.append(found)
    return front
