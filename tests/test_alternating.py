"""Sums of codes or a mask and a low rank, solved in turn, and low ranks in the Fisher's own metrics."""

from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hesse.constraints import Constraint, Grid, LowRank, Plus, Sparse, SparseGrid, Table
from hesse.curvature import Curvature, Diagonal, Gram, Identity, Kronecker
from hesse.errors import OptionError, UnsupportedProduct
from hesse.methods import Options, find_method
from hesse.methods.constraint_options import ConstraintOptions
from hesse.methods.curvatures import CURVATURES
from hesse.methods.solver_options import SolverOptions
from hesse.solvers import Alternating, ErrorFeedback, Nearest, Repair, Solver, TwoSidedFeedback, WhitenedSVD, solve
from hesse.testing import normal, seeds

OUT, IN = 8, 12


def gram(seed: int, width: int = IN) -> Gram:
    inputs = normal(seed, 4 * width, width) * normal(seed + 1, width).exp() + normal(seed + 2, 4 * width, 1)
    return Gram.from_inputs(inputs).damped(0.01)


def kronecker(seed: int) -> Kronecker:
    plain = Kronecker(output_factor=gram(seed, OUT).second_moment, input_factor=gram(seed + 5).second_moment)
    return plain.with_damped_factors(0.1, 0.01)


def rows_and_columns(seed: int) -> Kronecker:
    return Kronecker(output_factor=normal(seed, OUT).square(), input_factor=normal(seed + 1, IN).square())


CASES: dict[str, tuple[Curvature, Solver, Constraint]] = {
    "identity-table": (Identity(), Nearest(), Table("nf3", 4)),
    "rows-columns-table": (rows_and_columns(0), Nearest(), Table("nf4", 4)),
    "rows-columns-sparse": (rows_and_columns(2), Nearest(), Sparse(0.6)),
    "inputs-sparse": (gram(1).diagonal_part(), Nearest(), Sparse(0.6, scope="row")),
    "gram-sparse": (gram(2), ErrorFeedback(), Sparse(0.6)),
    "gram-joint": (gram(3), ErrorFeedback(), Sparse(2, 4) & Grid(4, 4)),
    "gram-grid": (gram(4), ErrorFeedback("descending"), Grid(3, 4)),
    "kronecker-grid": (kronecker(5), TwoSidedFeedback(), Grid(3, 4)),
}
EVERY_CASE = pytest.mark.parametrize(("curvature", "first", "base"), CASES.values(), ids=CASES)


def whole(curvature: Curvature) -> Tensor:
    """H with its damping, on row-major weights."""
    size = OUT * IN
    basis = torch.eye(size, dtype=torch.float64).view(size, OUT, IN)
    return curvature.matvec(basis).reshape(size, size) + curvature.damping * torch.eye(size).double()


@EVERY_CASE
def test_it_is_never_above_a_repair_nor_its_first_turn_and_ends_where_turns_rise(
    curvature: Curvature, first: Solver, base: Constraint
) -> None:
    constraint = base + LowRank(2, dtype=torch.float64)
    assert isinstance(constraint, Plus)
    gained = False
    for seed in range(5):
        weight = normal(seed, OUT, IN) + 2 * normal(seed + 9, OUT, 1) @ normal(seed + 8, 1, IN)
        solver = Alternating(first, WhitenedSVD())
        found = solve(weight, curvature, constraint, solver)
        repaired = solve(weight, curvature, constraint, Repair(first, WhitenedSVD()))
        state = solver.init(curvature)
        turns = [curvature.quadratic(constraint.decode(c) - weight) for c in solver.turns(state, weight, constraint)]
        rise = next((k for k, (a, b) in enumerate(pairwise(turns), 1) if b >= a), len(turns))
        assert found.predicted_loss_increase == pytest.approx(min(repaired.predicted_loss_increase, *turns[:rise]))
        gained |= found.predicted_loss_increase < repaired.predicted_loss_increase
    assert gained


@EVERY_CASE
def test_each_low_rank_is_the_best_for_what_the_other_part_leaves(
    curvature: Curvature, first: Solver, base: Constraint
) -> None:
    constraint = base + LowRank(2, dtype=torch.float64)
    weight, metric = normal(3, OUT, IN), whole(curvature)
    found = solve(weight, curvature, constraint, Alternating(first, WhitenedSVD()))

    def cost(correction: Tensor) -> float:
        change = (constraint.base.decode(found.encoded.base) + correction - weight).reshape(-1)
        return float(change @ metric @ change)

    best = cost(constraint.correction.decode(found.encoded.correction))
    left, right = found.encoded.correction.left, found.encoded.correction.right
    for seed in range(30):  # a minimum over both factors has no better neighbours
        nearby = (left + 0.02 * normal(seed, *left.shape)) @ (right + 0.02 * normal(seed + 50, *right.shape))
        assert cost(nearby) >= best * (1 - 1e-9)


@EVERY_CASE
def test_a_full_rank_is_exact(curvature: Curvature, first: Solver, base: Constraint) -> None:
    weight = normal(4, OUT, IN)
    constraint = base + LowRank(OUT, dtype=torch.float64)
    solver = Alternating(first, WhitenedSVD())
    found = solver.compute(solver.init(curvature), weight, constraint)  # solve refuses it: two dense factors
    torch.testing.assert_close(constraint.decode(found), weight)


@EVERY_CASE
def test_without_rounds_it_is_a_repair(curvature: Curvature, first: Solver, base: Constraint) -> None:
    weight, constraint = normal(5, OUT, IN), base + LowRank(3, dtype=torch.float64)
    alternated = solve(weight, curvature, constraint, Alternating(first, WhitenedSVD(), rounds=0))
    torch.testing.assert_close(
        alternated.weight, solve(weight, curvature, constraint, Repair(first, WhitenedSVD())).weight
    )


def test_a_weight_that_is_such_a_sum_is_found() -> None:
    sparse = torch.zeros(OUT, IN, dtype=torch.float64)
    sparse[torch.arange(OUT), torch.arange(OUT)] = 3.0
    weight = sparse + normal(6, OUT, 1) @ normal(7, 1, IN)
    constraint = Sparse(1 - OUT / (OUT * IN)).stored_as(torch.float64) + LowRank(1, dtype=torch.float64)
    found = solve(weight, Identity(), constraint, Alternating(Nearest(), WhitenedSVD(), rounds=400))
    torch.testing.assert_close(found.weight, weight, atol=1e-4, rtol=1e-4)
    repaired = solve(weight, Identity(), constraint, Repair(Nearest(), WhitenedSVD()))
    assert repaired.predicted_loss_increase > 0.1


def test_one_spike_and_one_direction_against_all_choices() -> None:
    """All masks tried, each with low ranks from many starts: what is found is near the least, and never below it."""
    weight = normal(8, 3, 3)
    constraint = Sparse(7 / 9).stored_as(torch.float64) + LowRank(1, dtype=torch.float64)
    least = float("inf")
    for places in combinations(range(9), 2):
        mask = torch.zeros(9, dtype=torch.bool)
        mask[list(places)] = True
        for start in range(6):
            kept = normal(start, 3, 3) * mask.view(3, 3) * start
            for _ in range(60):  # both steps are exact for a given mask
                low = LowRank(1, dtype=torch.float64).nearest(weight - kept)
                kept = (weight - low) * mask.view(3, 3)
            least = min(least, 0.5 * float((weight - low - kept).square().sum()))
    found = solve(weight, Identity(), constraint, Alternating(Nearest(), WhitenedSVD(), rounds=100))
    repaired = solve(weight, Identity(), constraint, Repair(Nearest(), WhitenedSVD()))
    assert least - 1e-9 <= found.predicted_loss_increase <= repaired.predicted_loss_increase


# The metrics of the Fisher


@dataclass
class Known:
    """A layer's weight and statistics."""

    weight: Tensor
    statistics: dict[str, Any]


def built(kind: str, fisher: Tensor | None, damping: float = 0.0) -> Curvature:
    statistics = {"inputs": gram(0)} | ({} if fisher is None else {"fisher diagonal": fisher})
    known = Known(torch.ones(OUT, IN).double(), statistics)
    return CURVATURES[kind].build(known, SolverOptions(name="whitened_svd"), damping)


def test_rows_and_columns_of_the_fisher_are_lq_loras() -> None:
    fisher, weight = normal(0, OUT, IN).square(), normal(1, OUT, IN)
    curvature = built("fisher_rows_columns", fisher)
    root = fisher.sqrt()
    scaled = root.mean(1).diag() @ weight @ root.mean(0).diag()
    left, values, right = torch.linalg.svd(scaled)
    expected = root.mean(1).diag().inverse() @ (left[:, :2] * values[:2]) @ right[:2] @ root.mean(0).diag().inverse()
    found = solve(weight, curvature, LowRank(2, dtype=torch.float64), WhitenedSVD()).weight
    torch.testing.assert_close(found, expected)
    outer = normal(2, OUT, 1).square() @ normal(3, 1, IN).square()  # where F is of that form it is F itself
    torch.testing.assert_close(built("fisher_rows_columns", outer.square()).diagonal(), outer.square())


def test_columns_of_the_fisher_are_fwsvds() -> None:
    fisher, weight = normal(0, OUT, IN).square(), normal(1, OUT, IN)
    importance = fisher.T.sum(1).sqrt()  # of the paper's weight (in, out): a sum over each of its rows
    left, values, right = torch.linalg.svd(importance.diag() @ weight.T)
    expected = importance.diag().inverse() @ (left[:, :3] * values[:3]) @ right[:3]
    found = solve(weight, built("fisher_columns", fisher), LowRank(3, dtype=torch.float64), WhitenedSVD()).weight
    torch.testing.assert_close(found, expected.T)
    equal = torch.ones(OUT, 1).double() @ normal(3, 1, IN).square()
    torch.testing.assert_close(built("fisher_columns", equal).diagonal(), equal)


@pytest.mark.parametrize("kind", ["fisher_rows_columns", "fisher_columns"])
@pytest.mark.parametrize("fisher", [None, torch.zeros(OUT, IN).double()], ids=["none", "nothing felt"])
def test_where_nothing_was_felt_weights_are_equals(kind: str, fisher: Tensor | None) -> None:
    torch.testing.assert_close(built(kind, fisher).diagonal(), torch.ones(OUT, IN).double())
    assert float(built(kind, fisher, damping=0.5).diagonal().min()) > 1


@settings(max_examples=25, deadline=None)
@given(seed=seeds, rank=st.integers(1, 4))
def test_a_diagonal_of_inputs_is_a_side(seed: int, rank: int) -> None:
    weight, values = normal(seed, OUT, IN), normal(seed + 1, IN).square()
    constraint = LowRank(rank, dtype=torch.float64)
    two = Kronecker(output_factor=torch.ones(OUT).double(), input_factor=values)
    found = solve(weight, Diagonal(values=values), constraint, WhitenedSVD())
    torch.testing.assert_close(found.weight, solve(weight, two, constraint, WhitenedSVD()).weight)
    dead = values.clone()
    dead[:3] = 0
    found = solve(weight, Diagonal(values=dead), constraint, WhitenedSVD())
    assert not found.weight[:, :3].any()
    left_out = torch.linalg.svdvals(weight * dead.sqrt())[rank:]
    assert found.predicted_loss_increase == pytest.approx(0.5 * float(left_out.square().sum()))


def test_a_diagonal_of_single_weights_has_no_sides() -> None:
    with pytest.raises(UnsupportedProduct, match="rows and columns of single weights have no SVD"):
        WhitenedSVD().init(Diagonal(values=torch.ones(OUT, IN)))


def test_nearest_takes_a_kronecker_of_two_diagonals_as_a_diagonal() -> None:
    weight, curvature = normal(0, OUT, IN), rows_and_columns(4)
    other = Diagonal(values=curvature.diagonal())
    torch.testing.assert_close(
        solve(weight, curvature, Sparse(0.5), Nearest()).weight, solve(weight, other, Sparse(0.5), Nearest()).weight
    )
    with pytest.raises(UnsupportedProduct, match="interactions of a Kronecker"):
        Nearest().init(kronecker(0))


# Recipes


def test_a_low_rank_is_added_to_a_sparse_part_or_a_joint_one() -> None:
    low = {"rank": 4}
    sparse, grid = {"amount": "2:4"}, {"bits": 4, "group_size": 8}
    assert ConstraintOptions.model_validate({"sparse": sparse, "low_rank": low}).build() == Sparse(2, 4) + LowRank(4)
    joint = ConstraintOptions.model_validate({"sparse": sparse, "grid": grid, "low_rank": low}).build()
    assert isinstance(joint, Plus)
    assert joint == SparseGrid(Sparse(2, 4), Grid(4, 8)) + LowRank(4)
    shape = torch.Size([OUT, 8])
    assert joint.bits_per_weight(shape) == Grid(4, 8).bits_per_weight(shape) + LowRank(4).bits_per_weight(shape)
    for refused in ({"sparse": sparse, "outliers": {}}, {"table": {}, "grid": grid, "low_rank": low}):
        with pytest.raises(OptionError, match="cannot be combined"):
            ConstraintOptions.model_validate(refused).build()


@pytest.mark.parametrize("name", ["eora", "sparse-low-rank"])
def test_two_four_and_four_bits_and_a_low_rank_in_one_method(name: str) -> None:
    (rule,) = find_method(name).recipe(Options(sparsity="2:4", bits=4, group_size=8, rank=3)).rules
    built = rule.constraint.build()
    assert isinstance(built, Plus)
    assert isinstance(built.base, SparseGrid)
    weight, curvature = normal(0, OUT, 16), gram(2, 16)
    found = solve(weight, curvature, built.stored_as(torch.float64), rule.solver.build())
    base = built.base.decode(found.encoded.base)
    assert float((base == 0).double().mean()) >= 0.5
    assert found.predicted_loss_increase < curvature.quadratic(base - weight)
