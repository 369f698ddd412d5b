"""The best choice under a budget, by mixed-integer programming, to a proven gap.

With one 0/1 variable z for each candidate, s_i = Σ z √loss is linear, and the predicted loss sᵀ R s a convex quadratic. The
part λ I of R, λ its lowest eigenvalue, is linear in z, as z² = z. The rest is met from below by tangents: the solution
under the tangents so far bounds the optimum, and adds its own tangent (outer approximation: Duran and Grossmann, 1986).
The programs are solved by HiGHS, through SciPy.
"""

import math
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from hesse.errors import OptionError
from hesse.planning.problem import Choice, Matrix, Problem

GAP = 1e-3  # a choice is taken as best when no other can cost less by more than this share
PROGRAM_GAP = 1e-4  # of one program, which is part of the above


def cheapest_within(problem: Problem, size: int) -> Choice:
    """The choice of the least predicted loss among those of at most `size` bytes, to within a share GAP.

    Raises:
        OptionError: no choice is that small; the message says how small the smallest is.
    """
    if size < problem.smallest:
        raise OptionError(f"nothing fits into {size:,} bytes: the smallest that can be reached is {problem.smallest:,}")
    program = _Program(problem)
    limit, best = size, None
    row = np.append(program.extra_sizes, 0.0)
    # HiGHS works to absolute tolerances, so losses are taken in units of a first answer.
    while best is None or best[0] > 0:
        limits = [(row, program.steps(limit))]
        choice, bound = program.minimise(program.loss_row, limits)
        if problem.size(choice) > size:  # the tolerance again: by a few bytes
            limit -= problem.size(choice) - size
            continue
        loss = problem.loss(choice)
        first, best = best is None, min(best or (loss, choice), (loss, choice))
        if first:
            program.unit = loss or 1.0
        elif best[0] <= bound * (1 + GAP):
            break
        program.add_tangent(choice)
    return best[1]


def smallest_within(problem: Problem, loss: float) -> Choice:
    """The choice of the fewest bytes among those that are predicted to cost at most `loss` nats per token.

    Raises:
        OptionError: no choice is found to cost so little; the message says what the least is.
    """
    least = tuple(int(np.argmin([c.loss for c in group.candidates])) for group in problem.groups)
    if problem.loss(least) > loss:
        raise OptionError(f"nothing costs as little as {loss:g} nats per token: the least is {problem.loss(least):.3g}")
    program = _Program(problem)
    program.unit = loss or 1.0
    row = np.append(program.extra_sizes / max(program.extra_sizes.max(), 1), 0.0)
    limit, seen = loss / program.unit, set[Choice]()
    while True:
        choice, _ = program.minimise(row, [(program.loss_row, limit)])
        if problem.loss(choice) <= loss:
            return choice
        if choice in seen:  # let through by HiGHS' tolerance
            limit -= problem.loss(choice) / program.unit - limit
        seen.add(choice)
        program.add_tangent(choice)


@dataclass
class _Program:
    """The candidates of all groups in one row of variables, with one more for the part of the loss under tangents."""

    problem: Problem
    unit: float = 1.0  # nats per token that losses are counted in
    tangents: list[Matrix] = field(default_factory=list)  # points s, (groups,)

    def __post_init__(self) -> None:
        groups = self.problem.groups
        self.owner = np.array([i for i, group in enumerate(groups) for _ in group.candidates])
        self.losses = np.array([c.loss for group in groups for c in group.candidates])
        self.starts = np.cumsum([0, *(len(group.candidates) for group in groups)])
        above = [c.size - min(o.size for o in group.candidates) for group in groups for c in group.candidates]
        self.step = math.gcd(*above) or 1
        self.extra_sizes = np.array(above) / self.step  # whole numbers, above the smallest choice
        self.unit = float(self.losses.max()) or 1.0
        lowest = min(max(self.problem.lowest_eigenvalue, 0.0), 1.0)
        self.linear = lowest
        self.rest = self.problem.correlations - lowest * np.eye(len(groups))

    @property
    def loss_row(self) -> Matrix:
        """The predicted loss as a row over all variables, in units."""
        return np.append(self.linear * self.losses / self.unit, 1.0)

    def steps(self, size: int) -> float:
        """`size` bytes in steps above the smallest choice; half a step more does not let another choice in."""
        return (size - self.problem.smallest) // self.step + 0.5

    def add_tangent(self, choice: Choice) -> None:
        """Bound the loss from below by its tangent at `choice`."""
        if np.abs(self.rest).max() > 1e-12:
            self.tangents.append(np.sqrt(self.losses[self.starts[:-1] + np.array(choice)]))

    def minimise(self, objective: Matrix, limits: list[tuple[Matrix, float]]) -> tuple[Choice, float]:
        """The choice of the least `objective` with each row of `limits` at most its number, and a bound in nats.

        The bound is of the objective where that is `loss_row`.
        """
        count, groups = len(self.owner), len(self.problem.groups)
        one_each = np.zeros((groups, count + 1))
        one_each[self.owner, np.arange(count)] = 1
        rows = [LinearConstraint(one_each, 1, 1)]
        rows += [LinearConstraint(row[None], -np.inf, top) for row, top in limits]
        if self.tangents:
            points = np.stack(self.tangents)
            slopes = points @ self.rest
            under = np.hstack(
                [2 * slopes[:, self.owner] * np.sqrt(self.losses) / self.unit, -np.ones((len(points), 1))]
            )
            rows.append(LinearConstraint(under, -np.inf, (slopes * points).sum(1) / self.unit))
        found = milp(
            objective,
            constraints=rows,
            integrality=np.append(np.ones(count), 0),
            bounds=Bounds(0, np.append(np.ones(count), np.inf)),
            options={"mip_rel_gap": PROGRAM_GAP},
        )
        if found.x is None:
            raise OptionError(f"the budget could not be shared out: HiGHS says {found.message}")
        taken = [int(np.argmax(found.x[a:b])) for a, b in zip(self.starts[:-1], self.starts[1:], strict=True)]
        return tuple(taken), float(found.mip_dual_bound) * self.unit
