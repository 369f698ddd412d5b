"""Tests that any solver inherits: its result, its promise, its workspace and its refusals."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from hesse.constraints import Constraint, Grouped, LowRank, Plus, Sparse, SparseGrid
from hesse.curvature import BlockRankOneSum, Curvature, Gram, Identity, Kronecker, RankOneSum
from hesse.errors import UnsupportedProduct
from hesse.solvers import Solution, Solver, solve
from hesse.solvers.base import solve_with
from hesse.testing.numbers import normal, precisions

# The curvatures of a weight (out, in) that a solver may be given.
KINDS = ("identity", "diagonal", "gram", "kronecker", "diagonal kronecker", "blocks", "gradients")
GRADIENTS, BLOCK_SIZE = 6, 8
SHAPES = [(96, 96), (320, 64), (64, 320)]  # on which the workspace is measured


@dataclass(frozen=True)
class Case:
    """A curvature of one of KINDS, and a constraint that the solver solves under it."""

    curvature: str
    constraint: Constraint
    name: str = ""

    def __str__(self) -> str:
        return f"{self.curvature}, {self.name or self.constraint}"


class SolverLaws:
    """Laws of every solver: a member of the set, never worse than promised, exactly predicted.

    A subclass supplies `build` and `cases`, and says in `plain` what the result is never worse than.

        class TestMine(SolverLaws):
            cases = (Case("gram", Grid(4, 8)),)
            def build(self): return Mine()
    """

    cases: ClassVar[tuple[Case, ...]]
    refused: ClassVar[tuple[str, ...]] = ()  # kinds of curvature that it must refuse
    refused_constraints: ClassVar[tuple[Case, ...]] = ()
    shape: tuple[int, int] = (16, 32)
    generous: float = 2.2  # the workspace that is declared, at most, in units of what was measured

    @abstractmethod
    def build(self) -> Solver:
        """Return the solver."""

    def plain(self, solution: Solution, case: Case) -> Tensor | None:
        """Return the member (out, in) that the result is never worse than; None where nothing is promised.

        By default the nearest in the Euclidean sense.
        """
        return case.constraint.nearest(solution.original)

    def _weight(self, seed: int = 0) -> Tensor:
        return 0.1 * normal(seed, *self.shape) * (0.5 * normal(seed + 1, self.shape[1])).exp()

    @precisions
    def test_the_result_is_in_the_set(self, dtype: torch.dtype) -> None:
        for case in self.cases:
            weight = self._weight().to(dtype)
            solution = solve(weight, curvature_of(case.curvature, self.shape, dtype), case.constraint, self.build())
            assert solution.weight.dtype == dtype
            assert torch.equal(case.constraint.decode(solution.encoded).to(dtype), solution.weight)
            check_member(case.constraint, solution.encoded, solution.weight)

    @precisions
    def test_it_is_never_worse_than_promised(self, dtype: torch.dtype) -> None:
        for case in self.cases:
            for seed in range(3):
                weight, curvature = self._weight(seed).to(dtype), curvature_of(case.curvature, self.shape, dtype, seed)
                solution = solve(weight, curvature, case.constraint, self.build())
                plain = self.plain(solution, case)
                if plain is not None:
                    limit = curvature.quadratic(plain.to(dtype) - weight)
                    assert solution.predicted_loss_increase <= limit * (1 + 1e-4) + 1e-12, str(case)

    def test_the_prediction_is_half_the_quadratic_form(self) -> None:
        for case in self.cases:
            weight, curvature = self._weight(), curvature_of(case.curvature, self.shape, torch.float64)
            solution = solve(weight, curvature, case.constraint, self.build())
            change = solution.weight - weight
            expected = 0.5 * float((change * (curvature @ change)).sum())
            assert solution.predicted_loss_increase == pytest.approx(expected, rel=1e-9, abs=1e-15)

    def test_what_it_is_given_is_left_as_it_is(self) -> None:
        for case in self.cases:
            weight, curvature = self._weight().float(), curvature_of(case.curvature, self.shape, torch.float32)
            inputs = [weight, *(getattr(curvature, field.name) for field in fields(curvature))]
            tensors = [each for each in inputs if isinstance(each, Tensor)]
            before = [tensor.clone() for tensor in tensors]
            solve(weight, curvature, case.constraint, self.build())
            assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))

    def test_one_state_serves_many_weights(self) -> None:
        for case in self.cases:
            solver, curvature = self.build(), curvature_of(case.curvature, self.shape, torch.float32)
            state = solver.init(curvature)
            for seed in (5, 6, 5):
                weight = self._weight(seed).float()
                shared = solve_with(weight, curvature, case.constraint, solver, state)
                assert torch.equal(shared.weight, solve(weight, curvature, case.constraint, solver).weight), str(case)

    def test_curvatures_that_it_cannot_use_are_refused_by_name(self) -> None:
        for kind in self.refused:
            with pytest.raises(UnsupportedProduct, match=type(self.build()).__name__):
                self.build().init(curvature_of(kind, self.shape, torch.float32))

    def test_sets_that_it_cannot_solve_are_refused_by_name(self) -> None:
        for case in self.refused_constraints:
            curvature = curvature_of(case.curvature, self.shape, torch.float32)
            with pytest.raises(UnsupportedProduct, match=type(self.build()).__name__):
                solve(self._weight().float(), curvature, case.constraint, self.build())

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_the_workspace_is_what_it_says(self, shape: tuple[int, int]) -> None:
        for case in self.cases:
            solver, weight = self.build(), normal(0, *shape).float()
            curvature = curvature_of(case.curvature, shape, torch.float32)
            held = sum(t.numel() for t in vars(curvature).values() if isinstance(t, Tensor))
            declared = solver.workspace(torch.Size(shape), type(curvature), case.constraint, held)
            measured = peak_bytes(lambda: solve(weight, curvature, case.constraint, solver))  # noqa: B023
            said = f"{case} on {shape}: {declared} declared, {measured} measured"
            assert measured <= declared, said
            assert declared <= self.generous * measured, said


def curvature_of(kind: str, shape: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> Curvature:
    """Return a new curvature of one of KINDS for a weight of `shape` (out, in), damped."""
    rows, columns = shape
    inputs = normal(seed + 10, 2 * columns, columns) * (0.5 * normal(seed + 11, columns)).exp()
    inputs = inputs + normal(seed + 12, 2 * columns, 1)
    gram = Gram.from_inputs(inputs.to(dtype))
    if kind == "identity":
        return Identity()
    if kind == "diagonal":
        return gram.diagonal_part()
    if kind == "gram":
        return gram.damped(0.01)
    gradients = normal(seed + 13, GRADIENTS, *shape).to(dtype)
    if kind == "blocks":
        return BlockRankOneSum.from_gradients(gradients, BLOCK_SIZE).damped(0.1)
    if kind == "gradients":
        return RankOneSum.from_gradients(gradients).damped(0.1)
    outputs = normal(seed + 14, 2 * rows, rows) * (0.5 * normal(seed + 15, rows)).exp() + normal(seed + 16, 2 * rows, 1)
    factor = (outputs.T @ outputs / len(outputs)).to(dtype)
    if kind == "diagonal kronecker":
        return Kronecker(output_factor=factor.diagonal().clone(), input_factor=gram.diagonal().clone())
    return Kronecker(output_factor=factor, input_factor=gram.second_moment).with_damped_factors(0.1, 0.01)


def check_member(constraint: Constraint, code: Any, weight: Tensor) -> None:
    """Assert what a member of `constraint` must look like, whatever found it."""
    assert bool(weight.isfinite().all())
    if isinstance(constraint, Plus):
        for part, stored in ((constraint.base, code.base), (constraint.correction, code.correction)):
            check_member(part, stored, part.decode(stored))
    if isinstance(constraint, Grouped | SparseGrid):
        bits = constraint.code_bits if isinstance(constraint, Grouped) else constraint.grid.code_bits
        assert int(code.codes.min()) >= -(1 << (bits - 1))
        assert int(code.codes.max()) < 1 << (bits - 1)
    if isinstance(constraint, LowRank):
        assert int(torch.linalg.matrix_rank(weight.double(), rtol=1e-6)) <= constraint.rank
    sparse = constraint.sparse if isinstance(constraint, SparseGrid) else constraint
    if isinstance(sparse, Sparse):
        if sparse.of is not None:
            assert int((weight.view(len(weight), -1, sparse.of) != 0).sum(-1).max()) <= int(sparse.amount)
        else:
            rows = weight.view(1, -1) if sparse.scope == "layer" else weight
            assert bool(((rows == 0).sum(1) >= sparse.drop_counts(weight) * sparse.block).all())


def peak_bytes(action: Callable[[], object]) -> int:
    """Return the peak memory of `action` in tensors, including temporaries of single operations.

    Counted from the allocations and releases of torch's CPU allocator, so the same on every run.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        action()
    events = recorded.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    held = largest = 0
    for _, change in changes:
        held += change
        largest = max(largest, held)
    return largest
