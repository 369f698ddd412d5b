"""Solve a layer by its rule and statistics, with a note for every departure from the rule."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from hesse.constraints import Constraint
from hesse.curvature import Curvature, Gram
from hesse.errors import ConditioningError, ConditioningWarning, UnsupportedProduct, naming
from hesse.estimation.statistics import STATISTICS
from hesse.methods.curvatures import CURVATURES
from hesse.methods.recipe import Rule
from hesse.processes import ALONE, Processes
from hesse.solvers import Nearest, Solution, Solver
from hesse.solvers.base import solve_with

LEAST_ROWS = 8  # per process that shares a layer; fewer are not worth the communication
DRY_SIZE = 8  # size of the matrix that a rule is tried on
DAMPING_STEPS = (10.0, 100.0, 1000.0)  # factors of the damping if the Gram cannot be factorised


@dataclass
class Solved:
    """Solution of a layer, with its method and damping."""

    solution: Solution
    method: str  # curvature × constraint × solver
    damping: float
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class LayerProblem:
    """Weight, statistics and rule of one layer."""

    name: str
    weight: Tensor  # (out, in)
    statistics: Mapping[str, Any]  # by name; "inputs" is always known
    rule: Rule
    constraint: Constraint

    @property
    def gram(self) -> Gram:
        """Return the Gram E[xxᵀ] of the layer's inputs."""
        return cast(Gram, self.statistics["inputs"])


class _State(NamedTuple):
    """A curvature, the statistics it was built from, and the solver's state for it."""

    statistics: tuple[Any, ...]
    curvature: Curvature
    state: Any

    def is_of(self, statistics: tuple[Any, ...]) -> bool:
        """Return True if the curvature was built from these same objects."""
        return all(one is other for one, other in zip(self.statistics, statistics, strict=True))


class LayerSolver:
    """Solver of one layer after another; layers with the same inputs share a factored curvature.

    A curvature is built and factored again only if one of its statistics is another object than before. Curvatures of
    other inputs than the last layer's are dropped. Several `processes` solve the same layers together.
    """

    def __init__(self, processes: Processes = ALONE) -> None:
        self._processes = processes
        self._inputs: Gram | None = None  # the inputs of `_states`
        self._states: dict[tuple[str, Solver, float, int], _State] = {}

    def solve(self, problem: LayerProblem) -> Solved:
        """Solve a layer.

        Raises:
            HesseError: the layer cannot be solved; the message begins with its name.
        """
        name, gram, rule = problem.name, problem.gram, problem.rule
        if gram is not self._inputs:
            self._inputs, self._states = gram, {}
        notes: list[str] = []
        with naming(name):
            if not rule.kind.needs:
                return self._solved(problem, rule.solver.build(), 0.0, notes)
            if gram.tokens == 0 or not bool(gram.diagonal().any()):
                reason = "all its inputs are zero on this data" if gram.tokens else "saw no calibration tokens"
                notes.append(f"{name}: {reason}; each weight was rounded to the nearest allowed value")
                identity = rule.model_copy(update={"curvature": "identity"})
                return self._solved(replace(problem, rule=identity), Nearest(), 0.0, notes)
            notes += _gaps(problem)
            solver = rule.solver.build()
            damping = 0.0 if rule.solver.name == "nearest" else rule.solver.damping
            for attempt in (damping, *(max(damping, 1e-4) * step for step in DAMPING_STEPS)):
                if attempt > damping:
                    notes.append(f"{name}: the Gram could not be factorised; damping was raised to {attempt:g}")
                try:
                    return self._solved(problem, solver, attempt, notes)
                except ConditioningError:
                    continue
            raise ConditioningError("the Gram could not be factorised at any damping: use more calibration tokens")

    def _solved(self, problem: LayerProblem, solver: Solver, damping: float, notes: list[str]) -> Solved:
        rule = problem.rule
        key = (rule.curvature, solver, damping, len(problem.weight) if rule.kind.couples_rows else 0)
        used = tuple(problem.statistics.get(name) for name in sorted(rule.kind.needs))
        if key not in self._states or not self._states[key].is_of(used):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", ConditioningWarning)
                curvature = rule.kind.build(problem, rule.solver, damping)
            notes += [f"{problem.name}: {warning.message}" for warning in caught]
            self._states[key] = _State(used, curvature, solver.init(curvature))
        _, curvature, state = self._states[key]
        whole = rule.kind.couples_rows or any(STATISTICS[name].of_weights for name in rule.kind.needs)
        parts = (problem.weight, curvature, problem.constraint, solver, state)
        alone = self._processes.world_size == 1
        solution = solve_with(*parts) if alone else _solve_shared(*parts, not whole, self._processes)
        method = " × ".join(type(part).__name__ for part in (curvature, problem.constraint, solver))
        return Solved(solution, method, damping, notes)


def _solve_shared(
    weight: Tensor,
    curvature: Curvature,
    constraint: Constraint,
    solver: Solver,
    state: Any,
    independent: bool,
    processes: Processes,
) -> Solution:
    """Solve by several processes as `solve_with` does, with the same result in each.

    `independent` is True if the curvature couples no rows. If the curvature or the constraint couples rows, each
    process solves the whole layer, and all use rank 0's solution, so that they do not differ in a last digit.
    """
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


def check_products(rule: Rule) -> None:
    """Check that a rule's curvature has the products that its solver needs.

    Raises:
        UnsupportedProduct: it lacks one; the message names the rule's layers, and the curvatures that have the product.
    """
    error = _missing_product(rule)
    if error is not None:
        usable = [kind for kind in CURVATURES if _missing_product(rule.model_copy(update={"curvature": kind})) is None]
        use = f"use curvature {' or '.join(usable)}" if usable else "no curvature will do"
        raise UnsupportedProduct(
            f"the rule for {', '.join(rule.layers[:3])}: {error}; with this solver and constraint {use}"
        )


def _missing_product(rule: Rule) -> UnsupportedProduct | None:
    """Return the error of solving a small matrix by a rule for the lack of a product; None if there is none."""
    solver, problem = rule.solver.build(), small_problem(rule, rule.constraint.build())
    try:
        solver.compute(solver.init(rule.kind.build(problem, rule.solver, 0.01)), problem.weight, problem.constraint)
    except UnsupportedProduct as error:
        return error
    return None


def small_problem(rule: Rule, constraint: Constraint) -> LayerProblem:
    """Return a problem that takes no time, to try a rule on."""
    weight = torch.eye(DRY_SIZE * constraint.together)
    return LayerProblem("a small matrix", weight, {"inputs": Gram.from_inputs(weight)}, rule, constraint)


def _gaps(problem: LayerProblem) -> list[str]:
    """Return notes on missing information in the curvature, and its effect on the solution."""
    notes = []
    name, gram, rule = problem.name, problem.gram, problem.rule
    width = gram.shape[0]
    dead = int((gram.diagonal() == 0).sum())
    if dead:
        given = rule.constraint
        codes = (given.grid, given.codebook, given.vector_codebook, given.table)
        effect = "rounded to nearest" if given.sparse is None and any(codes) else "considered free to change"
        notes.append(f"{name}: {dead} of {width} inputs are always zero on this data; their weights were {effect}")
    if rule.kind.inverts_gram and gram.tokens < width:
        notes.append(
            f"{name}: saw {gram.tokens} tokens for {width} inputs; in directions without data the solution depends on "
            "the damping"
        )
    for statistic in (STATISTICS[needed] for needed in sorted(rule.kind.needs)):
        if statistic.missing is not None and not statistic.is_known(problem.statistics.get(statistic.name)):
            notes.append(f"{name}: {statistic.missing}")
    return notes


class Effect(NamedTuple):
    """Effect of a change d (out, in) of a layer's weight."""

    squared_error: float  # E‖d x‖² of a token's outputs
    loss_increase: float | None  # ½ dᵀ(G ⊗ E[xxᵀ])d, in nats per token; None without G


def effect(change: Tensor, gram: Gram, output_factor: Tensor | None) -> Effect:
    """Return the effect of `change` (out, in), with the output factor G = E[ggᵀ] (out, out) or its diagonal (out,)."""
    if output_factor is not None and output_factor.ndim == 2:
        image = gram.matvec(change)
        return Effect(_inner(change, image), 0.5 * _inner(output_factor.to(change) @ change, image))
    rows = gram.row_quadratics(change).double()
    return Effect(2 * float(rows.sum()), None if output_factor is None else float(output_factor.to(rows) @ rows))


def _inner(left: Tensor, right: Tensor) -> float:
    return float(torch.linalg.vecdot(left, right).double().sum())
