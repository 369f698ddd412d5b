"""Solve the multiple-choice knapsack of a budget as a mixed-integer program.

There is one 0/1 variable per candidate, and each group takes exactly one. HiGHS solves the programs, through SciPy, to
a proven gap.
"""

import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from hesse.errors import OptionError
from hesse.planning.problem import Choice, Problem

GAP = 1e-4  # no other choice is better by more than this share


def cheapest_within(problem: Problem, size: int) -> Choice:
    """Return the choice of least predicted loss within `size` bytes.

    Raises:
        OptionError: no choice is that small; the message gives the smallest size.
    """
    if size < problem.smallest:
        raise OptionError(f"nothing fits into {size:,} bytes: the smallest that can be reached is {problem.smallest:,}")
    losses, (steps, step) = _losses(problem), _steps(problem)
    room = (size - problem.smallest) // step + 0.5  # half a step more admits no other choice
    unit = float(losses.max()) or 1.0
    while True:  # HiGHS has absolute tolerances, so losses are scaled by the answer
        choice = _minimum(problem, losses / unit, steps / room)
        if problem.size(choice) > size:  # within HiGHS' tolerance
            room -= (problem.size(choice) - size) / step
            continue
        found = problem.loss(choice)
        if found == 0 or found > unit / 10:
            return choice
        unit = found


def smallest_within(problem: Problem, loss: float) -> Choice:
    """Return the smallest choice whose predicted loss increase is at most `loss` nats per token.

    Raises:
        OptionError: no choice costs so little; the message gives the least loss.
    """
    least = sum(min(candidate.loss for candidate in group.candidates) for group in problem.groups)
    if least > loss:
        raise OptionError(f"nothing costs as little as {loss:g} nats per token: the least is {least:.3g}")
    limit, steps = loss or 1e-30, _steps(problem)[0]
    while True:
        choice = _minimum(problem, steps / max(steps.max(), 1), _losses(problem) / limit)
        if problem.loss(choice) <= loss:
            return choice
        limit -= 2 * (problem.loss(choice) - loss)  # admitted by HiGHS' tolerance


def _losses(problem: Problem) -> NDArray[np.float64]:
    """Return the losses of all candidates of all groups, in one row."""
    return np.array([candidate.loss for group in problem.groups for candidate in group.candidates])


def _steps(problem: Problem) -> tuple[NDArray[np.float64], int]:
    """Return the sizes above each group's smallest, in one row, as multiples of a step, and the step in bytes."""
    above = [c.size - min(o.size for o in group.candidates) for group in problem.groups for c in group.candidates]
    step = math.gcd(*above) or 1
    return np.array(above) / step, step


def _minimum(problem: Problem, objective: NDArray[np.float64], limited: NDArray[np.float64]) -> Choice:
    """Return the choice with the least sum of `objective` whose sum of `limited` is at most 1."""
    counts = [len(group.candidates) for group in problem.groups]
    starts = np.cumsum([0, *counts])
    columns = np.arange(starts[-1])
    one_each = csr_array((np.ones(len(columns)), (np.repeat(np.arange(len(counts)), counts), columns)))
    shares = np.minimum(limited, 2)  # still infeasible alone, and on a scale that suits HiGHS' tolerances
    with _silent_output():
        found = milp(
            objective,
            constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(shares[None], -np.inf, 1)],
            integrality=np.ones(len(columns)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": GAP},
        )
    if found.x is None:
        raise OptionError(f"the budget could not be shared out: HiGHS says {found.message}")
    return tuple(int(np.argmax(taken)) for taken in np.split(found.x, starts[1:-1]))


@contextmanager
def _silent_output() -> Iterator[None]:
    """Silence HiGHS, which prints to standard output, among machine-readable output, whatever its options are."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
