"""GreedySurgeon, ADMM, Repair, RowsAndColumns and two-sided WhitenedSVD against slow references and closed forms."""

from itertools import combinations

import pytest
import torch
from torch import Tensor

from hesse.constraints import Constraint, Grid, GridCode, LowRank, Plus, Sparse
from hesse.curvature import BlockRankOneSum, Curvature, Gram, Identity, Kronecker
from hesse.errors import ConditioningError, OptionError, UnsupportedProduct
from hesse.solvers import (
    ADMM,
    ErrorFeedback,
    GreedySurgeon,
    Nearest,
    Repair,
    RowsAndColumns,
    Solver,
    WhitenedSVD,
    solve,
)
from hesse.solvers.rows_and_columns import interpolation_points
from hesse.testing import normal

IN, OUT = 12, 6


def moment(seed: int, width: int) -> Tensor:
    rows = normal(seed, 4 * width, width) * normal(seed + 1, width).exp() + normal(seed + 2, 4 * width, 1)
    return rows.T @ rows / len(rows)


def gram(seed: int, width: int = IN) -> Gram:
    return Gram(second_moment=moment(seed, width), tokens=4 * width).damped(0.01)


def damped(curvature: Gram) -> Tensor:
    return curvature.second_moment + curvature.damping * torch.eye(len(curvature.second_moment)).double()


# Optimal Brain Surgeon, one weight at a time


def pruned_row(row: Tensor, hessian: Tensor, group: int, kept: int) -> list[tuple[float, int]]:
    """What ExactOBS drops of a row, in its order and with its costs, by solving anew for every weight at every turn."""
    dropped: list[tuple[float, int]] = []
    gone: list[int] = []
    before = 0.0
    limit = len(row) // group * (group - kept) if group else len(row)
    while len(gone) < limit:
        prices = {}
        for p in set(range(len(row))) - set(gone):
            if group and sum(q // group == p // group for q in gone) >= group - kept:
                continue
            prices[p] = removal_cost(row, hessian, [*gone, p])
        cheapest = min(prices, key=prices.__getitem__)
        dropped.append((prices[cheapest] - before, cheapest))
        before = prices[cheapest]
        gone.append(cheapest)
    return dropped


def removal_cost(row: Tensor, hessian: Tensor, gone: list[int]) -> float:
    """½ w_Qᵀ ([H⁻¹]_QQ)⁻¹ w_Q."""
    inside = torch.linalg.inv(hessian)[gone][:, gone]
    return 0.5 * float(row[gone] @ torch.linalg.solve(inside, row[gone]))


def refitted(row: Tensor, hessian: Tensor, mask: Tensor) -> Tensor:
    """The values of the weights that are kept at which ½ dᵀHd is least."""
    result = torch.zeros_like(row)
    result[mask] = torch.linalg.solve(hessian[mask][:, mask], (hessian @ row)[mask])
    return result


@pytest.mark.parametrize("seed", range(4))
def test_a_row_loses_the_weights_that_exact_surgery_removes(seed: int) -> None:
    weight, curvature = normal(seed, OUT, IN), gram(10 + seed)
    found = solve(weight, curvature, Sparse(0.5, scope="row").stored_as(torch.float64), GreedySurgeon())
    hessian = damped(curvature)
    for row, result in zip(weight, found.weight, strict=True):
        gone = {place for _, place in pruned_row(row, hessian, 0, 0)[: IN // 2]}
        assert set((result == 0).nonzero().flatten().tolist()) == gone
        torch.testing.assert_close(result, refitted(row, hessian, result != 0), rtol=1e-4, atol=1e-5)


def test_a_layer_loses_what_costs_least_over_all_rows() -> None:
    weight, curvature = normal(1, OUT, IN) * torch.arange(1, OUT + 1)[:, None], gram(20)
    found = solve(weight, curvature, Sparse(0.4).stored_as(torch.float64), GreedySurgeon())
    hessian, steps = damped(curvature), []
    for number, row in enumerate(weight):
        highest = 0.0
        for price, place in pruned_row(row, hessian, 0, 0):
            highest = max(highest, price)
            steps.append((highest, number, place))
    gone = {(number, place) for _, number, place in sorted(steps, key=lambda step: step[0])[: round(0.4 * OUT * IN)]}
    assert {tuple(place) for place in (found.weight == 0).nonzero().tolist()} == gone


@pytest.mark.parametrize(("kept", "of"), [(2, 4), (1, 4), (1, 2), (3, 6)])
def test_a_pattern_is_kept_to_by_exact_surgery(kept: int, of: int) -> None:
    weight, curvature = normal(2, OUT, IN), gram(30)
    found = solve(weight, curvature, Sparse(kept, of).stored_as(torch.float64), GreedySurgeon())
    assert bool(((found.weight != 0).view(OUT, -1, of).sum(-1) == kept).all())
    for row, result in zip(weight, found.weight, strict=True):
        gone = {place for _, place in pruned_row(row, damped(curvature), of, kept)}
        assert set((result == 0).nonzero().flatten().tolist()) == gone


def rounded_row(row: Tensor, hessian: Tensor, scale: Tensor, grid: Grid) -> tuple[Tensor, bool]:
    """OBQ on one row, solving anew for what is free at every turn; and whether two weights once cost about the same."""
    present, done, close = row.clone(), torch.zeros(len(row), dtype=torch.bool), False
    while not bool(done.all()):
        inverse = torch.linalg.inv(hessian[~done][:, ~done])
        free = (~done).nonzero().flatten()
        value = ((present / scale).round().clamp(grid.lowest, grid.highest) * scale)[free]
        error = present[free] - value
        price = error.square() / inverse.diagonal()
        price = torch.where(error.abs() > 0.5001 * scale[free].abs(), -price, price)
        order = price.sort().values
        close = close or (len(order) > 1 and float(order[1] - order[0]) < 1e-4 * float(order[1].abs()))
        p = int(price.argmin())
        moved = present[free] - error[p] / inverse[p, p] * inverse[p]
        moved[p] = value[p]
        present[free] = moved
        done[free[p]] = True
    return present, close


@pytest.mark.parametrize("seed", range(6))
def test_rounding_one_by_one_is_obq(seed: int) -> None:
    weight, curvature, grid = normal(seed, OUT, IN), gram(40 + seed), Grid(3, 4)
    found = GreedySurgeon().compute(GreedySurgeon().init(curvature), weight, grid)
    assert isinstance(found, GridCode)
    scale = grid.expand(grid.fit(weight).scale, IN).double()
    same = 0
    for number, row in enumerate(weight):
        expected, close = rounded_row(row, damped(curvature), scale[number], grid)
        ours = grid.decode(found)[number].double()
        equal = bool(torch.isclose(ours, expected, atol=1e-5).all())
        assert equal or close or curvature.quadratic(ours - row) < curvature.quadratic(expected - row)
        same += equal
    assert same >= OUT - 2


GRIDS = [Grid(2, 4), Grid(3, -1, symmetric=False), Grid(3, 5, signed=True)]
SPARSE = [Sparse(0.5), Sparse(0.7, scope="row"), Sparse(2, 4)]


@pytest.mark.parametrize(
    ("solver", "constraint"),
    [*((GreedySurgeon(), each) for each in (*GRIDS, *SPARSE)), *((ADMM(), each) for each in SPARSE)],
    ids=str,
)
def test_never_worse_than_without_the_others_making_it_good(solver: Solver, constraint: Constraint) -> None:
    for seed in range(5):
        weight, curvature = normal(seed, 8, 20), gram(50 + seed, 20)
        found = solve(weight, curvature, constraint, solver)
        plain = constraint.nearest(weight) if isinstance(constraint, Grid) else weight * (found.weight != 0)
        for row, base, result in zip(weight, plain, found.weight, strict=True):
            assert curvature.quadratic(result - row) <= curvature.quadratic(base - row) * (1 + 1e-5) + 1e-9


def test_surgery_beats_one_order_for_all_rows() -> None:
    """The claim of Optimal Brain Compression, in the sum over some problems."""
    ours = theirs = 0.0
    for seed in range(6):
        weight, curvature = normal(seed, 16, 24), gram(60 + seed, 24)
        for constraint in (Sparse(0.5, scope="row"), Sparse(2, 4)):
            ours += solve(weight, curvature, constraint, GreedySurgeon()).predicted_loss_increase
            theirs += solve(weight, curvature, constraint, ErrorFeedback()).predicted_loss_increase
    assert ours < theirs


# Under blocks of gradients


@pytest.mark.parametrize("size", [4, 8, 12, 36])
@pytest.mark.parametrize("constraint", [Sparse(0.5), Sparse(0.3), Sparse(2, 4)], ids=str)
def test_blocks_lose_what_exact_surgery_removes(size: int, constraint: Sparse) -> None:
    """OBERT's costs and values, with the costs of all that are gone before; the blocks do not end where rows do."""
    weight, gradients = normal(5, 5, 8), normal(6, 30, 5, 8)
    curvature = BlockRankOneSum.from_gradients(gradients, size).damped(0.05)
    found = solve(weight, curvature, constraint.stored_as(torch.float64), GreedySurgeon()).weight
    hessian = curvature.matrix() + curvature.damping * torch.eye(40).double()
    steps, flat = [], weight.flatten()
    for number, start in enumerate(range(0, 40, size)):
        block = slice(start, min(start + size, 40))
        inside = hessian[block, block]
        highest = 0.0
        for price, place in pruned_row(flat[block], inside, constraint.of or 0, int(constraint.amount)):
            highest = max(highest, price)
            steps.append((highest, number, start + place))
    limit = len(steps) if constraint.of else round(constraint.amount * 40)
    gone = {place for *_, place in sorted(steps, key=lambda step: step[0])[:limit]}
    assert set((found.flatten() == 0).nonzero().flatten().tolist()) == gone
    torch.testing.assert_close(found.flatten(), refitted(flat, hessian, found.flatten() != 0), rtol=1e-6, atol=1e-8)


def test_what_blocks_cannot_do() -> None:
    curvature = BlockRankOneSum.from_gradients(normal(6, 30, 5, 8), 6).damped(0.05)
    with pytest.raises(UnsupportedProduct, match="blocks do not end where rows do"):
        solve(normal(5, 5, 8), curvature, Sparse(0.5, scope="row"), GreedySurgeon())
    with pytest.raises(UnsupportedProduct, match="blocks of 6 weights cut the groups of 4"):
        solve(normal(5, 5, 8), curvature, Sparse(2, 4), GreedySurgeon())
    with pytest.raises(UnsupportedProduct, match="Sparse under blocks, not Grid"):
        solve(normal(5, 5, 8), curvature, Grid(), GreedySurgeon())


# ADMM


@pytest.mark.parametrize("constraint", [Sparse(0.6), Sparse(0.5, scope="row"), Sparse(2, 4)], ids=str)
def test_admm_leaves_the_best_values_for_its_mask(constraint: Sparse) -> None:
    weight, curvature = normal(3, OUT, IN), gram(70)
    found = solve(weight, curvature, constraint.stored_as(torch.float64), ADMM(refit_steps=40))
    mask = found.weight != 0
    assert torch.equal(mask.sum(), constraint.mask(weight.square()).sum())
    for row, result, kept in zip(weight, found.weight, mask, strict=True):
        torch.testing.assert_close(result, refitted(row, damped(curvature), kept), rtol=1e-6, atol=1e-8)


def test_the_iteration_alone_comes_to_the_same_values() -> None:
    """Without a refit: the fixed point of ADMM at a mask is the least-squares solution."""
    weight, curvature = normal(4, OUT, IN), gram(80)
    found = solve(
        weight,
        curvature,
        Sparse(0.5).stored_as(torch.float64),
        ADMM(steps=4000, settled_steps=3990, strengths=(1.0, 1.0), refit_steps=0),
    ).weight
    for row, result in zip(weight, found, strict=True):
        torch.testing.assert_close(result, refitted(row, damped(curvature), result != 0), rtol=1e-4, atol=1e-5)


def test_admm_beats_a_late_mask_where_much_is_dropped() -> None:
    ours = theirs = 0.0
    for seed in range(6):
        weight, curvature = normal(seed, 32, 48), gram(90 + seed, 48)
        ours += solve(weight, curvature, Sparse(0.7), ADMM()).predicted_loss_increase
        theirs += solve(weight, curvature, Sparse(0.7), ErrorFeedback()).predicted_loss_increase
    assert ours < theirs


@pytest.mark.parametrize("constraint", [Sparse(0.6), Sparse(0.5, scope="row"), Sparse(2, 4)], ids=str)
def test_admm_on_both_sides_leaves_the_best_values_for_its_mask(constraint: Sparse) -> None:
    weight, curvature = normal(3, OUT, IN), kronecker(70).with_damped_factors(0.3, 0.01)
    found = solve(weight, curvature, constraint.stored_as(torch.float64), ADMM(refit_steps=200)).weight
    kept = (found != 0).flatten()
    assert int(kept.sum()) == int(constraint.mask(weight.square()).sum())
    hessian = curvature.matrix()
    wanted = torch.zeros(OUT * IN, dtype=torch.float64)
    wanted[kept] = torch.linalg.solve(hessian[kept][:, kept], hessian[kept] @ weight.flatten())
    torch.testing.assert_close(found.flatten(), wanted, rtol=1e-5, atol=1e-7)


def test_admm_on_both_sides_with_equal_outputs_is_that_on_one() -> None:
    weight, inputs = normal(5, OUT, IN), gram(71)
    curvature = Kronecker(output_factor=torch.eye(OUT).double(), input_factor=damped(inputs))
    one, two = (solve(weight, each, Sparse(0.5), ADMM()).weight for each in (inputs, curvature))
    assert torch.equal(one != 0, two != 0)
    torch.testing.assert_close(one, two, rtol=1e-2, atol=1e-3)  # refitted row by row, or as a whole


def test_admm_on_both_sides_comes_near_the_best_of_all_masks() -> None:
    best = ours = plain = 0.0
    for seed in range(5):
        weight, curvature = normal(seed, 3, 4), small_kronecker(seed, 3, 4)
        hessian, flat = curvature.matrix(), weight.flatten()
        costs = []
        for chosen in combinations(range(12), 6):
            kept = list(chosen)
            values = torch.zeros(12, dtype=torch.float64)
            values[kept] = torch.linalg.solve(hessian[kept][:, kept], hessian[kept] @ flat)
            costs.append(curvature.quadratic((values - flat).view(3, 4)))
        best += min(costs)
        ours += solve(weight, curvature, Sparse(0.5), ADMM()).predicted_loss_increase
        plain += curvature.quadratic(Sparse(0.5).nearest(weight, curvature.diagonal()) - weight)
    assert best <= ours * (1 + 1e-5)
    assert ours < 1.5 * best
    assert ours < 0.8 * plain


@pytest.mark.parametrize("constraint", SPARSE, ids=str)
def test_admm_on_both_sides_is_never_worse_than_its_mask_alone(constraint: Sparse) -> None:
    for seed in range(5):
        weight, curvature = normal(seed, 8, 20), small_kronecker(seed, 8, 20)
        found = solve(weight, curvature, constraint, ADMM(refit_steps=1))
        assert found.predicted_loss_increase <= curvature.quadratic(weight * (found.weight != 0) - weight) + 1e-9


# Low rank on two sides


def small_kronecker(seed: int, rows: int, columns: int) -> Kronecker:
    factors = Kronecker(output_factor=moment(seed, rows), input_factor=moment(seed + 3, columns))
    return factors.with_damped_factors(0.3, 0.01)


def kronecker(seed: int) -> Kronecker:
    curvature = Kronecker(output_factor=moment(seed, OUT), input_factor=moment(seed + 3, IN))
    return curvature.with_damped_factors(0.1, 0.01)


@pytest.mark.parametrize("diagonal", [False, True])
def test_a_low_rank_in_a_metric_of_two_sides_is_the_best(diagonal: bool) -> None:
    curvature, weight = kronecker(0), normal(5, OUT, IN)
    if diagonal:
        curvature = Kronecker(
            output_factor=curvature.output_factor.diagonal(), input_factor=curvature.input_factor.diagonal()
        )
    found = solve(weight, curvature, LowRank(3).stored_as(torch.float64), WhitenedSVD())
    full = [part if part.ndim == 2 else part.diag() for part in (curvature.output_factor, curvature.input_factor)]
    roots = [torch.linalg.cholesky(part) for part in full]
    left_out = torch.linalg.svdvals(roots[0].T @ weight @ roots[1])[3:]
    assert found.predicted_loss_increase == pytest.approx(0.5 * float(left_out.square().sum()), rel=1e-6)


def test_with_equal_outputs_two_sides_are_one() -> None:
    weight, one = normal(6, OUT, IN), gram(5)
    two = Kronecker(output_factor=torch.ones(OUT).double(), input_factor=damped(one))
    constraint = LowRank(2).stored_as(torch.float64)
    torch.testing.assert_close(
        solve(weight, two, constraint, WhitenedSVD()).weight, solve(weight, one, constraint, WhitenedSVD()).weight
    )
    torch.testing.assert_close(solve(weight, Identity(), constraint, WhitenedSVD()).weight, constraint.nearest(weight))
    singular = Kronecker(output_factor=torch.zeros(OUT), input_factor=torch.eye(IN))
    with pytest.raises(ConditioningError, match="with_damped_factors"):
        solve(weight, singular, constraint, WhitenedSVD())


# Rows and columns


@pytest.mark.parametrize("curvature", [Identity(), gram(6)], ids=["identity", "gram"])
def test_factors_are_rows_and_columns_of_the_weight(curvature: Curvature) -> None:
    weight, constraint = normal(7, OUT, IN), LowRank(3).stored_as(torch.float64)
    found = solve(weight, curvature, constraint, RowsAndColumns())
    rows = [row for row in found.encoded.right if any(torch.equal(row, own) for own in weight)]
    assert len(rows) == 3
    left = found.encoded.left
    spanned = left @ torch.linalg.lstsq(left, weight).solution
    inside = [j for j in range(IN) if torch.allclose(spanned[:, j], weight[:, j], atol=1e-9)]
    assert len(inside) == 3
    best = solve(weight, curvature, constraint, WhitenedSVD())
    metric = damped(curvature) if isinstance(curvature, Gram) else torch.eye(IN).double()

    def cost(member: Tensor) -> float:
        return float(((member - weight) @ metric * (member - weight)).sum())

    assert cost(best.weight) <= cost(found.weight) * (1 + 1e-9)
    own_columns, own_rows = weight[:, inside], torch.stack(rows)
    join = torch.linalg.lstsq(own_columns, left).solution
    for seed in range(20):
        other = own_columns @ (join + 0.01 * normal(seed, 3, 3)) @ own_rows
        assert cost(other) >= cost(found.weight) - 1e-9


def test_a_weight_of_that_rank_is_kept() -> None:
    weight = normal(8, OUT, 2) @ normal(9, 2, IN)
    found = solve(weight, gram(7), LowRank(2).stored_as(torch.float64), RowsAndColumns())
    torch.testing.assert_close(found.weight, weight, rtol=1e-6, atol=1e-8)


def test_interpolation_points_are_distinct_and_well_placed() -> None:
    vectors = torch.linalg.qr(normal(10, 30, 6)).Q
    points = interpolation_points(vectors)
    assert len(set(points.tolist())) == 6
    assert int(points[0]) == int(vectors[:, 0].abs().argmax())
    assert float(torch.linalg.cond(vectors[points])) < 1e3


# Sums


def test_a_repair_is_the_best_correction_of_its_base() -> None:
    weight, curvature = normal(11, OUT, IN), gram(8)
    constraint = (Grid(2, 4) + LowRank(2)).stored_as(torch.float64)
    assert isinstance(constraint, Plus)
    found = solve(weight, curvature, constraint, Repair(ErrorFeedback(), WhitenedSVD()))
    base = constraint.base.decode(found.encoded.base)
    left = (weight - base) @ torch.linalg.cholesky(damped(curvature))
    cost = ((found.weight - weight) @ damped(curvature) * (found.weight - weight)).sum()
    assert float(cost) == pytest.approx(float(torch.linalg.svdvals(left)[2:].square().sum()), rel=1e-6)
    alone = solve(weight, curvature, Grid(2, 4), ErrorFeedback())
    assert found.predicted_loss_increase < alone.predicted_loss_increase


def test_a_sum_says_what_it_is() -> None:
    constraint, shape = Grid(4, 4) + LowRank(2), torch.Size([OUT, IN])
    parts = Grid(4, 4).bits_per_weight(shape), LowRank(2).bits_per_weight(shape)
    assert constraint.bits_per_weight(shape) == pytest.approx(sum(parts))
    assert not constraint.rows_are_independent
    assert (Grid(4, 4) + Sparse(0.9, scope="row")).rows_are_independent
    weight = normal(12, OUT, IN).float()
    plain = solve(weight, Identity(), constraint, Repair(Nearest(), WhitenedSVD()))
    torch.testing.assert_close(plain.weight, constraint.nearest(weight))
    assert (plain.weight - weight).norm() < (Grid(4, 4).nearest(weight) - weight).norm()
    with pytest.raises(OptionError, match="a sum has two parts"):
        _ = constraint + LowRank(1)
    with pytest.raises(OptionError, match="rank 9 is not below the smaller side"):
        solve(weight, Identity(), Grid(4, 4) + LowRank(9), Nearest())


@pytest.mark.parametrize(
    ("solver", "curvature", "constraint", "said"),
    [
        (ADMM(), Identity(), Sparse(0.5), "needs a Gram or a Kronecker"),
        (ADMM(), gram(0), Grid(), "solves Sparse"),
        (GreedySurgeon(), Identity(), Sparse(0.5), "needs a Gram"),
        (GreedySurgeon(), gram(0), LowRank(2), "solves Grid and Sparse under a Gram"),
        (RowsAndColumns(), kronecker(0), LowRank(2), "needs an Identity or a Gram"),
        (RowsAndColumns(), gram(0), Grid(), "solves LowRank"),
        (WhitenedSVD(), gram(0), Grid(), "solves LowRank"),
        (Repair(Nearest(), WhitenedSVD()), Identity(), Grid(), "solves sums"),
    ],
)
def test_what_a_solver_cannot_do_it_says(
    solver: Solver, curvature: Curvature, constraint: Constraint, said: str
) -> None:
    with pytest.raises(UnsupportedProduct, match=said):
        solve(normal(0, OUT, IN), curvature, constraint, solver)
