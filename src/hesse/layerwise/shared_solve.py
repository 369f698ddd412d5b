"""Solve one layer by several processes, each a shard of the rows, if rows are independent."""

from dataclasses import fields, is_dataclass, replace
from typing import Any

from torch import Tensor

from hesse.constraints import Constraint
from hesse.curvature import Curvature
from hesse.processes import Processes
from hesse.solvers import Solution, Solver
from hesse.solvers.base import solve_with

LEAST_ROWS = 8  # per process; fewer are not worth the communication


def solve_shared(
    weight: Tensor,
    curvature: Curvature,
    constraint: Constraint,
    solver: Solver,
    state: Any,
    independent: bool,
    processes: Processes,
) -> Solution:
    """Solve as `solve_with` does, with the same result in every process.

    `independent` is True if the curvature couples no rows. If the curvature or the constraint couples rows, each
    process solves the whole layer, and all use rank 0's solution, so that they do not differ in a last digit.
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
    """Return the code of all rows: tensors concatenated in the order of the processes if `split`, else rank 0's."""
    if isinstance(encoded, Tensor):
        return processes.all_gather(encoded) if split else processes.broadcast(encoded)
    if is_dataclass(encoded) and not isinstance(encoded, type):
        parts = {field.name: _together(getattr(encoded, field.name), processes, split) for field in fields(encoded)}
        return replace(encoded, **parts)
    return encoded
