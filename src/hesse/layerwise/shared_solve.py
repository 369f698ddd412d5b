"""One layer solved by several processes: each its share of the rows, where rows do not depend on one another."""

from dataclasses import fields, is_dataclass, replace
from typing import Any

from torch import Tensor

from hesse.constraints import Constraint
from hesse.curvature import Curvature
from hesse.processes import Processes
from hesse.solvers import Solution, Solver
from hesse.solvers.base import solve_with

LEAST_ROWS = 8  # of a process; fewer are not worth what it takes to bring them together


def solve_shared(
    weight: Tensor,
    curvature: Curvature,
    constraint: Constraint,
    solver: Solver,
    state: Any,
    independent: bool,
    processes: Processes,
) -> Solution:
    """As `solve_with`, the same in every process.

    `independent` says that the curvature couples no rows; if it does, or the constraint does, each process solves the
    whole layer, and all take the first one's solution, so that they do not part ways by a last digit.
    """
    if processes.world_size == 1:
        return solve_with(weight, curvature, constraint, solver, state)
    split = independent and constraint.rows_are_independent and len(weight) >= LEAST_ROWS * processes.world_size
    share = processes.shard_of(len(weight)) if split else range(len(weight))
    own = solve_with(weight[share.start : share.stop], curvature, constraint, solver, state)
    encoded = _together(own.encoded, processes, split)
    solved = constraint.decode(encoded).to(own.weight.dtype)
    return Solution(solved, encoded, weight.to(solved.dtype), curvature)


def _together(encoded: Any, processes: Processes, split: bool) -> Any:
    """A stored form of all rows: tensors one after another in the order of the processes, or the first one's."""
    if isinstance(encoded, Tensor):
        return processes.all_gather(encoded) if split else processes.broadcast(encoded)
    if is_dataclass(encoded) and not isinstance(encoded, type):
        parts = {field.name: _together(getattr(encoded, field.name), processes, split) for field in fields(encoded)}
        return replace(encoded, **parts)
    return encoded
