"""Every solver has the laws: a member of the set, never worse than promised, its memory as declared."""

import pytest
import torch
from torch import Tensor

from hesse.constraints import (
    Codebook,
    Constraint,
    EitherSide,
    Grid,
    Grouped,
    LowRank,
    MixedGrid,
    Rotated,
    SalientColumns,
    ScaledColumns,
    SignRankOne,
    Sparse,
    SparseGrid,
    Table,
    VectorCodebook,
)
from hesse.solvers import (
    ADMM,
    ActivationAware,
    Alternating,
    CheaperSide,
    ErrorFeedback,
    GreedySurgeon,
    Incoherent,
    LearnedRounding,
    Nearest,
    RefitSalient,
    Repair,
    RowsAndColumns,
    SalientBits,
    Solution,
    Solver,
    StepwiseSurgeon,
    SummedSurgeon,
    TwoSidedFeedback,
    VectorFeedback,
    WhitenedSVD,
    solve,
)
from hesse.testing import SolverLaws
from hesse.testing.solver import KINDS, Case, curvature_of

GRID, ASYMMETRIC = Grid(4, 16, dtype=torch.bfloat16), Grid(3, 16, symmetric=False)
HALF, PATTERN = Sparse(0.5), Sparse(2, 4)


def others(*kinds: str) -> tuple[str, ...]:
    return tuple(kind for kind in KINDS if kind not in kinds)


def under(kind: str, *constraints: Constraint) -> tuple[Case, ...]:
    return tuple(Case(kind, constraint) for constraint in constraints)


def on_the_same_grid(solution: Solution, constraint: Constraint) -> Tensor:
    """Plain rounding with the scales, and plain zeroing with the mask, that the solver chose."""
    code, weight = solution.encoded, solution.original
    if isinstance(constraint, SparseGrid):
        kept = constraint.decode(code) != 0
        return constraint.decode(constraint.grid.round(weight * kept, code.scales))
    if isinstance(constraint, Grouped):
        return constraint.decode(constraint.round(weight, code.scales))
    if isinstance(constraint, Sparse):
        return weight * code.mask
    return constraint.nearest(weight)


class TestNearest(SolverLaws):
    cases = (
        *under(
            "identity", GRID, ASYMMETRIC, HALF, PATTERN, Sparse(0.5, scope="row"), Sparse(0.5, block=4), HALF & GRID
        ),
        *under("identity", LowRank(4), Codebook(3), Table(name="nf4", group_size=16), GRID + LowRank(4)),
        *under("identity", Codebook(2) + Sparse(0.95), MixedGrid(Grid(3, 16)), EitherSide(GRID), Rotated(GRID)),
        *under("identity", ScaledColumns(GRID), SalientColumns(), SignRankOne(), VectorCodebook(2, 2)),
        *under("diagonal", HALF, Codebook(3)),
        *under("diagonal kronecker", HALF),
    )
    refused = ("gram", "kronecker", "blocks", "gradients")
    refused_constraints = ()

    def build(self) -> Solver:
        return Nearest()

    def test_a_low_rank_under_a_metric_is_refused(self) -> None:
        with pytest.raises(Exception, match="LowRank has no weighted nearest member"):
            solve(self._weight(), curvature_of("diagonal", self.shape, torch.float64), LowRank(2), Nearest())


class TestErrorFeedback(SolverLaws):
    cases = (
        *under("gram", GRID, ASYMMETRIC, HALF, Sparse(0.5, scope="row"), PATTERN, HALF & GRID, PATTERN & ASYMMETRIC),
        *under("gram", Codebook(3), Table(group_size=16)),
    )
    refused = others("gram")
    refused_constraints = (Case("gram", LowRank(4)), Case("gram", GRID + LowRank(2)))

    def build(self) -> Solver:
        return ErrorFeedback()

    def plain(self, solution: Solution, case: Case) -> Tensor | None:
        if isinstance(case.constraint, SparseGrid):
            return None  # on the mask, of which a zero code shows only a part
        return on_the_same_grid(solution, case.constraint)


class TestErrorFeedbackDescending(TestErrorFeedback):
    cases = (Case("gram", GRID), Case("gram", HALF), Case("gram", Codebook(3)))

    def build(self) -> Solver:
        return ErrorFeedback("descending")


class TestTwoSidedFeedback(SolverLaws):
    cases = under("kronecker", GRID, ASYMMETRIC, HALF & GRID, PATTERN & GRID, Codebook(3))
    refused = others("kronecker")
    refused_constraints = (Case("kronecker", HALF), Case("kronecker", LowRank(4)))

    def build(self) -> Solver:
        return TwoSidedFeedback()

    def plain(self, solution: Solution, case: Case) -> Tensor | None:
        return None if isinstance(case.constraint, SparseGrid) else case.constraint.nearest(solution.original)


class TestADMM(SolverLaws):
    cases = tuple(Case(kind, each) for kind in ("gram", "kronecker") for each in (HALF, PATTERN))
    refused = others("gram", "kronecker", "diagonal kronecker")
    refused_constraints = (Case("gram", GRID),)

    def build(self) -> Solver:
        return ADMM(steps=8)

    def plain(self, solution: Solution, case: Case) -> Tensor:
        return on_the_same_grid(solution, case.constraint)


class TestWhitenedSVD(SolverLaws):
    cases = tuple(Case(kind, LowRank(4)) for kind in ("identity", "diagonal", "gram", "kronecker"))
    refused = ("blocks", "gradients")
    refused_constraints = (Case("gram", GRID),)

    def build(self) -> Solver:
        return WhitenedSVD()


class TestRowsAndColumns(SolverLaws):
    cases = (Case("identity", LowRank(4)), Case("gram", LowRank(4)))
    refused = others("identity", "gram")
    refused_constraints = (Case("gram", HALF),)

    def build(self) -> Solver:
        return RowsAndColumns()

    def plain(self, solution: Solution, case: Case) -> Tensor:
        return torch.zeros_like(solution.original)  # WhitenedSVD is never worse than this solver


class TestRepair(SolverLaws):
    cases = (Case("gram", GRID + LowRank(4)),)
    refused = ("blocks", "gradients")
    refused_constraints = (Case("gram", GRID),)

    def build(self) -> Solver:
        return Repair(ErrorFeedback(), WhitenedSVD())

    def plain(self, solution: Solution, case: Case) -> Tensor:
        alone = solve(solution.original, solution.curvature, case.constraint.base, ErrorFeedback())  # type: ignore[attr-defined]
        return alone.weight

    test_curvatures_that_it_cannot_use_are_refused_by_name = None  # its parts refuse, by their own names


class TestRepairOfTwoSides(TestRepair):
    cases = (Case("kronecker", GRID + LowRank(4)),)
    refused_constraints = (Case("kronecker", GRID),)

    def build(self) -> Solver:
        return Repair(TwoSidedFeedback(), WhitenedSVD())

    def plain(self, solution: Solution, case: Case) -> Tensor:
        alone = solve(solution.original, solution.curvature, case.constraint.base, TwoSidedFeedback())  # type: ignore[attr-defined]
        return alone.weight


class TestAlternating(TestRepair):
    def build(self) -> Solver:
        return Alternating(ErrorFeedback(), WhitenedSVD(), 3)

    def plain(self, solution: Solution, case: Case) -> Tensor:
        repair = Repair(ErrorFeedback(), WhitenedSVD())
        return solve(solution.original, solution.curvature, case.constraint, repair).weight


class TestActivationAware(SolverLaws):
    cases = (Case("gram", ScaledColumns(GRID)),)
    refused = others("gram")
    refused_constraints = (Case("gram", GRID),)

    def build(self) -> Solver:
        return ActivationAware()


class TestCheaperSide(SolverLaws):
    cases = (Case("gram", EitherSide(GRID)), Case("kronecker", EitherSide(GRID)))
    refused_constraints = (Case("gram", GRID),)

    def build(self) -> Solver:
        return CheaperSide()

    def plain(self, solution: Solution, case: Case) -> Tensor:
        return GRID.nearest(solution.original)


class TestCheaperSideOfFeedback(TestCheaperSide):
    cases = (Case("gram", EitherSide(GRID)),)

    def build(self) -> Solver:
        return CheaperSide(ErrorFeedback())

    def plain(self, solution: Solution, case: Case) -> Tensor:
        return solve(solution.original, solution.curvature, GRID, ErrorFeedback()).weight


class TestGreedySurgeon(SolverLaws):
    cases = (*under("gram", GRID, ASYMMETRIC, HALF, PATTERN), *under("blocks", HALF))
    refused = others("gram", "blocks")
    refused_constraints = (Case("gram", LowRank(4)), Case("blocks", GRID))

    def build(self) -> Solver:
        return GreedySurgeon()

    def plain(self, solution: Solution, case: Case) -> Tensor:
        return on_the_same_grid(solution, case.constraint)


class TestIncoherent(SolverLaws):
    cases = (Case("gram", Rotated(GRID)),)
    refused = others("gram")
    refused_constraints = (Case("gram", GRID),)

    def build(self) -> Solver:
        return Incoherent()


class TestLearnedRounding(SolverLaws):
    cases = (Case("gram", GRID), Case("gram", ASYMMETRIC))
    refused = others("gram", "kronecker", "diagonal kronecker")
    refused_constraints = (Case("gram", HALF),)

    def build(self) -> Solver:
        return LearnedRounding(steps=10)

    def plain(self, solution: Solution, case: Case) -> Tensor:
        return solve(solution.original, solution.curvature, case.constraint, ErrorFeedback()).weight


class TestLearnedRoundingOfTwoSides(TestLearnedRounding):
    cases = (Case("kronecker", GRID),)
    refused = others("gram", "kronecker", "diagonal kronecker")

    def build(self) -> Solver:
        return LearnedRounding(TwoSidedFeedback(), steps=10)

    def plain(self, solution: Solution, case: Case) -> Tensor:
        return solve(solution.original, solution.curvature, case.constraint, TwoSidedFeedback()).weight

    refused_constraints = (Case("kronecker", HALF),)


class TestRefitSalient(SolverLaws):
    cases = (Case("gram", SalientColumns()),)
    refused = others("gram")
    refused_constraints = (Case("gram", GRID),)

    def build(self) -> Solver:
        return RefitSalient()

    def plain(self, solution: Solution, case: Case) -> Tensor:
        return case.constraint.nearest(solution.original, solution.curvature.diagonal())


class TestSalientBits(SolverLaws):
    cases = (Case("gram", MixedGrid(Grid(3, 8))),)
    refused = others("gram")
    refused_constraints = (Case("gram", GRID),)

    def build(self) -> Solver:
        return SalientBits()

    def plain(self, solution: Solution, case: Case) -> Tensor:
        return solve(solution.original, solution.curvature, Grid(3, 8), ErrorFeedback()).weight


class TestStepwiseSurgeon(SolverLaws):
    cases = tuple(Case(kind, each) for kind in ("blocks", "gradients") for each in (HALF, PATTERN))
    refused = others("blocks", "gradients")
    refused_constraints = (Case("gradients", GRID), Case("gradients", Sparse(0.5, block=4)))

    def build(self) -> Solver:
        return StepwiseSurgeon(steps=2)

    def plain(self, solution: Solution, case: Case) -> Tensor | None:
        return None  # never worse than zeroing the same weights under H + λI, which is not what is predicted

    def test_under_the_damped_curvature_no_zeroing_of_the_same_weights_is_cheaper(self) -> None:
        for case in self.cases:
            weight, curvature = self._weight(), curvature_of(case.curvature, self.shape, torch.float64)
            solution = solve(weight, curvature, case.constraint.stored_as(torch.float64), self.build())
            ridge = curvature.damping / 2
            costs = [
                curvature.quadratic(member - weight) + ridge * float((member - weight).square().sum())
                for member in (solution.weight, weight * solution.encoded.mask)
            ]
            assert costs[0] <= costs[1] * (1 + 1e-9)


class TestSummedSurgeon(TestStepwiseSurgeon):
    def build(self) -> Solver:
        return SummedSurgeon()

    test_under_the_damped_curvature_no_zeroing_of_the_same_weights_is_cheaper = None  # the sum is no minimum


class TestVectorFeedback(SolverLaws):
    cases = (Case("gram", VectorCodebook(2, 2)),)
    refused = others("gram")
    refused_constraints = (Case("gram", GRID),)

    def build(self) -> Solver:
        return VectorFeedback()

    def plain(self, solution: Solution, case: Case) -> Tensor:
        metric = solution.curvature.diagonal()
        return case.constraint.decode(case.constraint.encode(solution.original, metric))


def all_subclasses(kind: type) -> set[type]:
    below = set(kind.__subclasses__())
    return below | {each for child in below for each in all_subclasses(child)}


def test_every_solver_has_its_laws() -> None:
    built = {type(value().build()) for name, value in globals().items() if name.startswith("Test")}
    assert {kind for kind in all_subclasses(Solver) if kind.__module__.startswith("hesse.solvers.")} - built == set()
