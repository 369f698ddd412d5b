"""Every solver against its definition: slow references, brute force, closed forms, and what must never happen."""

import gc
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hesse.constraints import Constraint, Grid, GridCode, LowRank, Scales, Sparse, SparseCode, SparseGrid
from hesse.curvature import Curvature, Diagonal, Gram, Identity, Kronecker
from hesse.errors import ConditioningError, ConditioningWarning, DataError, OptionError, UnsupportedProduct
from hesse.solvers import (
    ErrorFeedback,
    GreedySurgeon,
    LearnedRounding,
    Nearest,
    Solution,
    Solver,
    TwoSidedFeedback,
    WhitenedSVD,
    solve,
)
from hesse.solvers._reference import gptq
from hesse.solvers.base import solve_with
from hesse.solvers.refit import refit_rows

seeds = st.integers(0, 2**31 - 1)
orders = st.sampled_from(["given", "descending"])


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated_inputs(seed: int, tokens: int, width: int) -> Tensor:
    """Inputs (tokens, in) with common directions and unequal scales, as activations have."""
    common = normal(seed, tokens, 2) @ normal(seed + 1, 2, width)
    return (normal(seed + 2, tokens, width) + common) * normal(seed + 3, width).exp()


def correlated_gram(seed: int, width: int, amount: float = 0.01) -> Gram:
    return Gram.from_inputs(correlated_inputs(seed, 4 * width, width)).damped(amount)


def correlated_kronecker(seed: int, rows: int, columns: int) -> Kronecker:
    inputs, outputs = (correlated_gram(seed + k, width).second_moment for k, width in ((0, columns), (9, rows)))
    return Kronecker(output_factor=outputs, input_factor=inputs).with_damped_factors(0.1, 0.01)


def row_costs(curvature: Curvature, change: Tensor) -> Tensor:
    """½ dᵀHd of each row (out,)."""
    return (curvature.matvec(change) * change).sum(1) / 2


# ErrorFeedback against the reference loop


def parts(constraint: Constraint) -> tuple[Grid | None, Sparse | None]:
    if isinstance(constraint, SparseGrid):
        return constraint.grid, constraint.sparse
    return constraint if isinstance(constraint, Grid) else None, constraint if isinstance(constraint, Sparse) else None


def plain_feedback(
    weight: Tensor, gram: Gram, constraint: Constraint, descending: bool, block_size: int, mask_columns: int
) -> tuple[Tensor, Tensor]:
    """The member that ErrorFeedback must find: the reference loop of GPTQ, with scales and masks decided on the way.

    Columns are taken as given, or those of the largest
    E[x²] first; then the scales of a grid are those of the whole weight. Masks are decided for `mask_columns`
    columns (or M) at once, by (w_j)² / H⁻¹_jj with every column before j gone; how many of them go is what one mask of
    all columns left gives the block that they are in, and one mask of the columns left in the block gives them. A row
    that comes out worse than by plain rounding and zeroing on the same grid and mask is replaced by that.

    Also returns the rows in which a weight fell half-way between two codes, where rounding noise decides (out,).
    """
    columns = weight.shape[1]
    grid, sparse = parts(constraint)
    hessian = gram.second_moment + gram.damping * torch.eye(columns, dtype=torch.float64)
    importance = gram.second_moment.diagonal()
    order = list(range(columns))
    if descending:
        order.sort(key=lambda column: -float(importance[column]))
    width = columns if grid is None or grid.group_size == -1 else grid.group_size

    pivots = []  # H⁻¹_jj once the columns before j are gone
    for step in range(columns):
        left = order[step:]
        pivots.append(torch.linalg.inv(hessian[left][:, left])[0, 0])

    kept = torch.ones_like(weight, dtype=torch.bool)
    scales = grid.fit(weight) if grid is not None else None
    pieces: list[Scales] = []
    tied = torch.zeros(len(weight), dtype=torch.bool)
    left = in_block = torch.zeros(0)
    if sparse is not None and sparse.of is None:
        left = torch.tensor([round(sparse.amount * columns)] * len(weight))
        left = left if sparse.scope == "row" else torch.tensor([round(sparse.amount * weight.numel())])

    def nearest(work: Tensor, column: int) -> Tensor:
        nonlocal left, in_block, tied
        step = order.index(column)
        span = mask_columns if sparse is None or sparse.of is None else sparse.of
        if sparse is not None and step % span == 0:
            scores = torch.stack([work[:, c].square() / pivots[order.index(c)] for c in order], dim=1)
            now, stop = min(step + span, columns), min(step // block_size * block_size + block_size, columns)
            if sparse.of is not None:
                dropped = torch.tensor([sparse.of - int(sparse.amount)] * len(weight))
            else:
                if step % block_size == 0:
                    in_block = plain_due(scores[:, step:], stop - step, left)
                    left = left - in_block
                dropped = plain_due(scores[:, step:stop], now - step, in_block)
                in_block = in_block - dropped
            kept[:, order[step:now]] = plain_mask(scores[:, step:now], dropped)
        if grid is not None and not descending and step % width == 0:
            group = slice(step, min(step + width, columns))
            pieces.append(grid.fit(work[:, group]))
        allowed = work[:, column] * kept[:, column]
        if grid is not None:
            assert scales is not None
            used, group_index = (scales, column // width) if descending else (pieces[-1], 0)
            tied |= half_way(allowed, used, group_index)
            allowed = plain_round(allowed, grid, used, group_index)
        return allowed

    swept = gptq(weight, hessian, order, nearest)
    plain = weight * kept
    if grid is not None:
        for column in range(columns):
            assert scales is not None
            used, group_index = (scales, column // width) if descending else (pieces[column // width], 0)
            plain[:, column] = plain_round(plain[:, column], grid, used, group_index)
    worse = row_costs(gram, plain - weight) < row_costs(gram, swept - weight)
    return torch.where(worse[:, None], plain, swept), tied


def half_way(column: Tensor, scales: Scales, group: int) -> Tensor:
    """Where `column` (out,) lies between two codes, which the extreme of a symmetric group always does (out,)."""
    steps = column / scales.scale[:, group]
    return (steps - steps.floor() - 0.5).abs() < 1e-9


def plain_round(column: Tensor, grid: Grid, scales: Scales, group: int) -> Tensor:
    scale = scales.scale[:, group]
    zero_point = torch.zeros_like(scale) if scales.zero_point is None else scales.zero_point[:, group]
    half = 2 ** (grid.bits - 1)
    codes = torch.clamp(torch.round(column / scale + zero_point), -half, half - 1)
    return ((codes - zero_point) * scale).to(grid.dtype).double()


def plain_mask(scores: Tensor, dropped: Tensor) -> Tensor:
    """True at the weights to keep (out, in), so many dropped of each row or, if it is one number, of all."""
    kept = torch.ones_like(scores, dtype=torch.bool)
    if len(dropped) == 1:
        kept.view(-1)[scores.flatten().argsort()[: int(dropped)]] = False
    else:
        for row in range(len(scores)):
            kept[row, scores[row].argsort()[: int(dropped[row])]] = False
    return kept


def plain_due(scores: Tensor, early: int, dropped: Tensor) -> Tensor:
    """How many of the first `early` columns go if `dropped` of the scores (out, columns) go, in all or row by row."""
    gone = ~plain_mask(scores, dropped)[:, :early]
    return gone.sum().view(1) if len(dropped) == 1 else gone.sum(1)


REFERENCE_CASES = {
    "grid-4-by-row": (Grid(4, -1), 24, 128),
    "grid-3-groups": (Grid(3, 8), 24, 128),
    "grid-2-groups-small-blocks": (Grid(2, 8), 24, 8),
    "grid-2-by-row-blocks-of-5": (Grid(2, -1), 24, 5),
    "grid-ragged-groups": (Grid(3, 10), 24, 16),
    "grid-asymmetric": (Grid(3, 8, symmetric=False), 24, 128),
    "grid-asymmetric-by-row": (Grid(2, -1, symmetric=False), 24, 128),
    "grid-bfloat16": (Grid(3, 8, dtype=torch.bfloat16), 24, 128),
    "grid-float16-8-bit-asymmetric": (Grid(8, 8, symmetric=False, dtype=torch.float16), 24, 128),
    "grid-bfloat16-8-bit-asymmetric": (Grid(8, -1, symmetric=False, dtype=torch.bfloat16), 24, 128),
    "sparse": (Sparse(0.5), 24, 128),
    "sparse-blocks": (Sparse(0.6), 24, 8),
    "sparse-blocks-of-7": (Sparse(0.7), 24, 7),
    "sparse-row": (Sparse(0.5, scope="row"), 24, 128),
    "sparse-row-blocks": (Sparse(0.3, scope="row"), 24, 12),
    "sparse-row-blocks-of-5": (Sparse(0.3, scope="row"), 24, 5),
    "2-of-4": (Sparse(2, 4), 24, 128),
    "1-of-4": (Sparse(1, 4), 24, 6),
    "2-of-4-and-grid": (Sparse(2, 4) & Grid(3, 8), 24, 128),
    "2-of-4-and-grid-across-groups": (Sparse(2, 4) & Grid(3, 6), 24, 12),
    "sparse-and-grid": (Sparse(0.5) & Grid(4, 8), 24, 8),
    "sparse-and-grid-asymmetric": (Sparse(0.5, scope="row") & Grid(3, -1, symmetric=False), 24, 128),
}


def orders_for(constraint: Constraint) -> list[str]:
    """Every order of columns; N:M groups are of neighbours and have only their own."""
    sparse = parts(constraint)[1]
    return ["given"] if sparse is not None and sparse.of is not None else ["given", "descending"]


def in_float64(constraint: Constraint) -> Constraint:
    """With unrounded values kept in float64, so that the comparison has no rounding of its own."""
    return constraint.stored_as(torch.float64) if constraint.dtype == torch.float32 else constraint


@pytest.mark.parametrize(("name", "order"), [(n, o) for n, (c, *_) in REFERENCE_CASES.items() for o in orders_for(c)])
def test_error_feedback_is_the_reference_loop_of_gptq(name: str, order: str) -> None:
    constraint, columns, block_size = REFERENCE_CASES[name]
    mask_columns = block_size if block_size % 4 else 4
    constraint = in_float64(constraint)
    for seed in range(3):
        weight, gram = normal(seed, 8, columns), correlated_gram(10 * seed, columns)
        solver = ErrorFeedback("descending" if order == "descending" else "given", block_size, mask_columns, 0)
        found = solve(weight, gram, constraint, solver)
        expected, tied = plain_feedback(weight, gram, constraint, order == "descending", block_size, mask_columns)
        same = torch.isclose(found.weight, expected, rtol=1e-8, atol=1e-8).all(1)
        assert bool((same | tied).all()), f"seed {seed}: rows {(~same & ~tied).nonzero().flatten().tolist()} differ"
        assert int(same.sum()) >= 6


def test_a_wide_layer_in_float32_agrees_with_float64() -> None:
    gram, weight = correlated_gram(0, 96), normal(1, 32, 96)
    single = Gram(second_moment=gram.second_moment.float(), tokens=gram.tokens, damping=gram.damping)
    for constraint in (Grid(4, 32), Sparse(2, 4)):
        exact = solve(weight, gram, constraint, ErrorFeedback())
        found = solve(weight.float(), single, constraint, ErrorFeedback())
        assert found.weight.dtype == torch.float32
        assert found.predicted_loss_increase == pytest.approx(exact.predicted_loss_increase, rel=0.02)


# ErrorFeedback: what must always hold


@settings(max_examples=40, deadline=None)
@given(
    seed=seeds,
    bits=st.integers(2, 8),
    group_size=st.sampled_from([-1, 4, 7]),
    symmetric=st.booleans(),
    order=orders,
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_no_row_is_worse_than_by_plain_rounding(
    seed: int, bits: int, group_size: int, symmetric: bool, order: str, dtype: torch.dtype
) -> None:
    weight, gram = normal(seed, 5, 16), correlated_gram(seed + 1, 16)
    grid = Grid(bits, group_size, symmetric, dtype=dtype)
    found = solve(weight, gram, grid, ErrorFeedback("descending" if order == "descending" else "given"))
    assert isinstance(found.encoded, GridCode)
    plain = grid.decode(grid.round(weight, found.encoded.scales))
    found_costs, plain_costs = row_costs(gram, found.weight - weight), row_costs(gram, plain - weight)
    assert bool((found_costs <= plain_costs * (1 + 1e-9)).all())


@settings(max_examples=40, deadline=None)
@given(
    seed=seeds,
    sparse=st.sampled_from([Sparse(0.5), Sparse(0.8), Sparse(0.3, scope="row"), Sparse(2, 4), Sparse(1, 4)]),
    mask_columns=st.sampled_from([4, 5, 128]),
    order=orders,
)
def test_no_row_is_worse_than_by_zeroing(seed: int, sparse: Sparse, mask_columns: int, order: str) -> None:
    weight, gram = normal(seed, 5, 16), correlated_gram(seed + 1, 16)
    descending = order == "descending" and sparse.of is None
    found = solve(
        weight,
        gram,
        in_float64(sparse),
        ErrorFeedback("descending" if descending else "given", mask_columns=mask_columns),
    )
    assert isinstance(found.encoded, SparseCode)
    found_costs = row_costs(gram, found.weight - weight)
    plain_costs = row_costs(gram, weight * found.encoded.mask - weight)
    assert bool((found_costs <= plain_costs * (1 + 1e-9)).all())


@settings(max_examples=40, deadline=None)
@given(
    seed=seeds, amount=st.floats(0, 0.99), scope=st.sampled_from(["layer", "row"]), mask_columns=st.integers(1, 17),
    block_size=st.integers(1, 17), order=orders,
)  # fmt: skip
def test_the_asked_number_is_pruned_however_few_columns_are_decided_at_once(
    seed: int, amount: float, scope: str, mask_columns: int, block_size: int, order: str
) -> None:
    weight, gram = normal(seed, 5, 16), correlated_gram(seed + 1, 16)
    sparse = Sparse(amount, scope="row" if scope == "row" else "layer")
    found = solve(
        weight,
        gram,
        sparse,
        ErrorFeedback("descending" if order == "descending" else "given", mask_columns=mask_columns),
    )
    pruned = ~found.encoded.mask
    assert not found.weight[pruned].any()
    if scope == "row":
        assert bool((pruned.sum(1) == round(amount * 16)).all())
    else:
        assert int(pruned.sum()) == round(amount * 80)


@pytest.mark.parametrize("sparse", [Sparse(0.5), Sparse(0.5, scope="row"), Sparse(2, 4)], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_joint_members_are_sparse_and_on_the_grid(sparse: Sparse, symmetric: bool) -> None:
    weight, gram, grid = normal(0, 8, 32), correlated_gram(1, 32), Grid(4, 8, symmetric)
    found = solve(weight, gram, sparse & grid, ErrorFeedback())
    assert int((found.weight == 0).sum()) >= 8 * 16
    if sparse.of is not None:
        assert bool((found.weight.view(-1, 4).count_nonzero(dim=1) <= 2).all())
    assert torch.equal(grid.decode(grid.round(found.weight, found.encoded.scales)), found.weight)


BLOCK_FREE: list[Constraint] = [Grid(3, 8), Grid(3, -1, symmetric=False), Sparse(2, 4), Sparse(2, 4) & Grid(3, 8)]


@pytest.mark.parametrize(("constraint", "order"), [(c, o) for c in BLOCK_FREE for o in orders_for(c)], ids=str)
def test_block_size_is_about_speed_alone(constraint: Constraint, order: str) -> None:
    weight, gram, constraint = normal(0, 6, 40), correlated_gram(1, 40), in_float64(constraint)
    results = [
        solve(weight, gram, constraint, ErrorFeedback("descending" if order == "descending" else "given", block_size))
        for block_size in (1, 3, 8, 16, 40, 128)
    ]
    for result in results[1:]:
        torch.testing.assert_close(result.weight, results[0].weight, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "constraint", [Grid(4, 8), Sparse(0.5, scope="row"), Sparse(2, 4), Sparse(2, 4) & Grid(4, 8)], ids=str
)
def test_rows_solved_apart_are_rows_solved_together(constraint: Constraint) -> None:
    weight, gram = normal(0, 6, 16), correlated_gram(1, 16)
    assert constraint.rows_are_independent
    whole = solve(weight, gram, constraint, ErrorFeedback()).weight
    apart = torch.cat([solve(row[None], gram, constraint, ErrorFeedback()).weight for row in weight])
    torch.testing.assert_close(whole, apart)


@pytest.mark.parametrize(
    "constraint",
    [Grid(4, 8), Grid(3, 8, symmetric=False), Sparse(0.5), Sparse(0.5, scope="row"), Sparse(2, 4)],
    ids=str,
)
def test_without_interactions_error_feedback_is_nearest(constraint: Constraint) -> None:
    weight = normal(0, 6, 16)
    gram = Gram(second_moment=torch.eye(16, dtype=torch.float64), tokens=16)
    found, nearest = solve(weight, gram, constraint, ErrorFeedback()), solve(weight, Identity(), constraint, Nearest())
    assert torch.equal(found.weight, nearest.weight)
    assert found.predicted_loss_increase == pytest.approx(nearest.predicted_loss_increase)


def test_codes_are_the_chosen_ones_where_two_share_a_value() -> None:
    # Far from zero, 8-bit steps are finer than bfloat16, so a code cannot be read back from the value it stands for.
    weight, grid = normal(0, 6, 64).abs(), Grid(8, -1, symmetric=False, dtype=torch.bfloat16)
    found = solve(weight, Gram(second_moment=torch.eye(64, dtype=torch.float64), tokens=64), grid, ErrorFeedback())
    codes = grid.encode(weight).codes
    assert torch.equal(found.encoded.codes, codes)
    assert not torch.equal(grid.round(found.weight, found.encoded.scales).codes, codes)


def test_a_diagonal_gram_is_nearest_in_its_metric() -> None:
    weight, values = normal(0, 6, 16), normal(1, 16).exp()
    for constraint in (Grid(2, 8), Sparse(0.5), Sparse(2, 4)):
        found = solve(weight, Gram(second_moment=values.diag(), tokens=16), constraint, ErrorFeedback())
        nearest = solve(weight, Diagonal(values=values), constraint, Nearest())
        assert torch.equal(found.weight, nearest.weight)


def test_members_come_back_unchanged() -> None:
    gram = correlated_gram(0, 16)
    sparse = Sparse(2, 4).stored_as(torch.float64)
    member = sparse.nearest(normal(1, 6, 16))
    assert torch.equal(solve(member, gram, sparse, ErrorFeedback()).weight, member)
    codes = torch.randint(-8, 8, (6, 16), generator=torch.Generator().manual_seed(0))
    codes[:, ::8], codes[:, 1::8] = -8, 7  # every group spans all codes, so its scale is found again
    found = solve(codes * 0.5, gram, Grid(4, 8, symmetric=False), ErrorFeedback())
    assert torch.equal(found.encoded.codes.long(), codes)
    assert found.predicted_loss_increase == 0


# ErrorFeedback against closed forms and brute force


@pytest.mark.parametrize("seed", range(8))
def test_one_pruned_weight_moves_the_later_ones_by_least_squares(seed: int) -> None:
    columns = 10
    inputs, weight = correlated_inputs(seed, 40, columns), normal(seed + 50, 1, columns)
    constraint = Sparse(1 / columns).stored_as(torch.float64)
    found = solve(weight, Gram.from_inputs(inputs), constraint, ErrorFeedback(refit_steps=0))
    pruned = int((~found.encoded.mask).nonzero()[0, 1])

    def outcome(column: int) -> tuple[float, Tensor]:
        """The least loss with `column` zeroed and only later columns free to answer, and the weight that has it."""
        answered = weight.clone()
        answered[0, column] = 0
        later = inputs[:, column + 1 :]
        if later.shape[1]:
            target = inputs[:, column : column + 1] * weight[0, column]
            answered[0, column + 1 :] += torch.linalg.lstsq(later, target).solution[:, 0]
        return float((inputs @ (answered - weight).T).square().mean() / 2), answered

    least, answered = outcome(pruned)
    torch.testing.assert_close(found.weight, answered)
    assert found.predicted_loss_increase == pytest.approx(least)
    assert least == pytest.approx(min(outcome(column)[0] for column in range(columns)))


def test_refitted_weights_are_the_least_squares_solution_for_their_mask() -> None:
    inputs, weight, damping = correlated_inputs(0, 60, 16), normal(1, 5, 16), 0.3
    gram = replace(Gram.from_inputs(inputs), damping=damping)
    found = solve(weight, gram, in_float64(Sparse(0.5)), ErrorFeedback(refit_steps=40))
    metric = gram.second_moment + damping * torch.eye(16, dtype=torch.float64)
    for row, kept, target in zip(found.weight, found.encoded.mask, weight, strict=True):
        exact = torch.linalg.solve(metric[kept][:, kept], metric[kept] @ target)
        torch.testing.assert_close(row[kept], exact)
        assert not row[~kept].any()


@settings(max_examples=40, deadline=None)
@given(seed=seeds, share=st.floats(0, 1), steps=st.integers(0, 6))
def test_refitting_makes_no_row_worse(seed: int, share: float, steps: int) -> None:
    weight, gram = normal(seed, 5, 16), correlated_gram(seed + 1, 16)
    kept = torch.rand(5, 16, generator=torch.Generator().manual_seed(seed)) < share
    found = [refit_rows(weight, weight * kept, kept, gram, n) for n in (steps, steps + 1)]
    before, after = (row_costs(gram, w - weight) + gram.damping / 2 * (w - weight).square().sum(1) for w in found)
    assert bool((after <= before + 1e-12).all())
    assert not found[1][~kept].any()


def test_refitting_leaves_what_is_solved() -> None:
    weight, gram = normal(0, 5, 16), correlated_gram(1, 16)
    assert torch.equal(refit_rows(weight, weight, torch.ones(5, 16, dtype=torch.bool), gram, 5), weight)
    nothing = torch.zeros(5, 16, dtype=torch.bool)
    assert torch.equal(refit_rows(weight, weight * nothing, nothing, gram, 5), weight * nothing)


def test_predicted_loss_increase_of_one_weight_is_that_of_optimal_brain_surgeon() -> None:
    # ½ w_p² / [H⁻¹]_pp for the first column, which leaves all others free.
    gram = Gram.from_inputs(correlated_inputs(0, 40, 8))
    weight = normal(1, 1, 8)
    weight[0, 0] = 1e-3  # so that it is the one to go
    found = solve(weight, gram, Sparse(1 / 8).stored_as(torch.float64), ErrorFeedback())
    assert not found.encoded.mask[0, 0]
    inverse = torch.linalg.inv(gram.second_moment)
    assert found.predicted_loss_increase == pytest.approx(float(weight[0, 0] ** 2 / inverse[0, 0] / 2))


def test_two_bit_roundings_lie_between_the_best_of_all_and_plain() -> None:
    found_total = plain_total = best_total = 0.0
    for seed in range(60):
        weight, gram = normal(seed, 1, 4), correlated_gram(seed + 100, 4)
        grid = Grid(2, -1, dtype=torch.float64)
        found = solve(weight, gram, grid, ErrorFeedback())
        scales = found.encoded.scales
        codes = torch.tensor(list(product(range(-2, 2), repeat=4)), dtype=torch.int8)
        everything = grid.decode(GridCode(codes, Scales(scales.scale.expand(256, 1), None)))
        best = float(row_costs(gram, everything - weight).min())
        plain = float(row_costs(gram, grid.decode(grid.round(weight, scales)) - weight))
        assert best - 1e-12 <= found.predicted_loss_increase <= plain + 1e-12
        best_total += best
        found_total += found.predicted_loss_increase
        plain_total += plain
    # It closes more than half of the gap, so it is not plain rounding by another name.
    assert found_total - best_total < 0.5 * (plain_total - best_total)


# Nearest


def test_nearest_with_the_diagonal_of_a_gram_is_wanda() -> None:
    inputs, weight = correlated_inputs(0, 60, 16), normal(1, 6, 16)
    gram = Gram.from_inputs(inputs)
    found = solve(weight, gram.diagonal_part(), Sparse(0.5, scope="row"), Nearest())
    scores = weight.abs() * inputs.square().mean(0).sqrt()
    for row in range(6):
        dropped = set(scores[row].argsort()[:8].tolist())
        assert set((found.weight[row] == 0).nonzero().flatten().tolist()) == dropped
    torch.testing.assert_close(found.weight, (weight * found.encoded.mask).float().double())


def test_nearest_with_the_identity_is_magnitude_pruning_and_plain_rounding() -> None:
    weight = normal(0, 6, 16)
    pruned = solve(weight, Identity(), Sparse(0.5), Nearest()).weight
    assert float(weight[pruned == 0].abs().max()) <= float(weight[pruned != 0].abs().min())
    assert torch.equal(solve(weight, Identity(), Grid(4, 8), Nearest()).weight, Grid(4, 8).nearest(weight))


def test_nearest_with_a_diagonal_per_weight_weighs_every_weight() -> None:
    weight, values = normal(0, 6, 16), normal(1, 6, 16).square()
    found = solve(weight, Diagonal(values=values), Sparse(0.5), Nearest())
    losses = weight.square() * values
    assert float(losses[~found.encoded.mask].max()) <= float(losses[found.encoded.mask].min())


# WhitenedSVD


@settings(max_examples=30, deadline=None)
@given(seed=seeds, rows=st.integers(2, 8), columns=st.integers(2, 8), data=st.data())
def test_whitened_svd_is_the_best_low_rank_in_the_metric(
    seed: int, rows: int, columns: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(1, min(rows, columns) - 1))
    weight, gram = normal(seed, rows, columns), correlated_gram(seed + 1, columns)
    constraint = LowRank(rank).stored_as(torch.float64)
    found = solve(weight, gram, constraint, WhitenedSVD()).weight
    assert int(torch.linalg.matrix_rank(found)) <= rank

    # The optimum by the symmetric root instead of the Cholesky factor: truncated SVD of W A^½, times A^-½.
    metric = gram.second_moment + gram.damping * torch.eye(columns, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(metric)
    root = vectors * values.sqrt() @ vectors.T
    left, singular, right = torch.linalg.svd(weight @ root, full_matrices=False)
    expected = (left[:, :rank] * singular[:rank]) @ right[:rank] @ torch.linalg.inv(root)
    torch.testing.assert_close(found @ root, expected @ root, rtol=1e-6, atol=1e-6)

    def cost(member: Tensor) -> float:
        return float(((member - weight) @ root).square().sum())

    assert cost(found) == pytest.approx(float(singular[rank:].square().sum()), abs=1e-9)
    competitor_left = normal(seed + 2, rows, rank)
    competitor = competitor_left @ torch.linalg.lstsq(competitor_left, weight @ root).solution @ torch.linalg.inv(root)
    assert cost(found) <= cost(competitor) + 1e-9
    assert cost(found) <= cost(LowRank(rank).stored_as(torch.float64).nearest(weight)) + 1e-9


def test_whitened_svd_costs_less_on_the_layers_outputs_than_plain_svd() -> None:
    weight, inputs = normal(0, 12, 10), correlated_inputs(1, 80, 10)
    gram, constraint = Gram.from_inputs(inputs), LowRank(3).stored_as(torch.float64)
    whitened, plain = solve(weight, gram, constraint, WhitenedSVD()), solve(weight, Identity(), constraint, Nearest())
    on_outputs = [float((inputs @ (found.weight - weight).T).square().sum(1).mean() / 2) for found in (whitened, plain)]
    assert whitened.predicted_loss_increase == pytest.approx(on_outputs[0])
    assert on_outputs[0] < on_outputs[1]


@pytest.mark.parametrize("factor", [1e-6, 3.0, 1e6])
def test_whitened_svd_does_not_see_scales(factor: float) -> None:
    weight, gram, constraint = normal(0, 6, 8), correlated_gram(1, 8), LowRank(2).stored_as(torch.float64)
    found = solve(weight, gram, constraint, WhitenedSVD())
    louder = Gram(second_moment=factor * gram.second_moment, tokens=gram.tokens, damping=factor * gram.damping)
    torch.testing.assert_close(solve(weight, louder, constraint, WhitenedSVD()).weight, found.weight)
    torch.testing.assert_close(solve(factor * weight, gram, constraint, WhitenedSVD()).weight, factor * found.weight)


def test_whitened_svd_with_white_inputs_is_plain_svd() -> None:
    weight, constraint = normal(0, 6, 8), LowRank(2).stored_as(torch.float64)
    white = Gram(second_moment=torch.eye(8, dtype=torch.float64), tokens=8)
    torch.testing.assert_close(solve(weight, white, constraint, WhitenedSVD()).weight, constraint.nearest(weight))


def test_whitened_svd_of_full_rank_is_the_weight() -> None:
    weight, solver, constraint = normal(0, 6, 8), WhitenedSVD(), LowRank(6).stored_as(torch.float64)
    found = solver.compute(solver.init(correlated_gram(1, 8)), weight, constraint)
    torch.testing.assert_close(constraint.decode(found), weight)
    with pytest.raises(OptionError, match="rank 6 is not below the smaller side"):  # which saves nothing
        solve(weight, correlated_gram(1, 8), constraint, solver)


# The join

PAIRS: dict[str, tuple[Solver, Curvature, Constraint]] = {
    "nearest-identity-grid": (Nearest(), Identity(), Grid(4, 8)),
    "nearest-diagonal-sparse": (Nearest(), Diagonal(values=normal(0, 16).square()), Sparse(0.5)),
    "error-feedback-grid": (ErrorFeedback(), correlated_gram(0, 16), Grid(4, 8)),
    "error-feedback-descending": (ErrorFeedback("descending"), correlated_gram(0, 16), Grid(4, 8)),
    "error-feedback-n-of-m": (ErrorFeedback(), correlated_gram(0, 16), Sparse(2, 4)),
    "error-feedback-joint": (ErrorFeedback(), correlated_gram(0, 16), Sparse(2, 4) & Grid(4, 8)),
    "two-sided-feedback": (TwoSidedFeedback(), correlated_kronecker(0, 8, 16), Grid(4, 8, headroom=1.0, signed=True)),
    "whitened-svd": (WhitenedSVD(), correlated_gram(0, 16), LowRank(3)),
}
EVERY_PAIR = pytest.mark.parametrize(("solver", "curvature", "constraint"), PAIRS.values(), ids=PAIRS.keys())


@EVERY_PAIR
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_solutions_are_consistent(
    solver: Solver, curvature: Curvature, constraint: Constraint, dtype: torch.dtype
) -> None:
    weight = normal(1, 8, 16).to(dtype)
    before = weight.clone()
    found = solve(weight, curvature, constraint, solver)
    assert torch.equal(weight, before)
    assert found.weight.dtype == dtype
    assert torch.equal(constraint.decode(found.encoded).to(dtype), found.weight)
    assert found.predicted_loss_increase == pytest.approx(curvature.quadratic(found.weight - weight))
    assert found.predicted_loss_increase > 0


@EVERY_PAIR
def test_nothing_is_left_for_the_cycle_collector(solver: Solver, curvature: Curvature, constraint: Constraint) -> None:
    """A cycle keeps large tensors until Python happens to look for it: memory that grows with the number of layers."""
    weight = normal(1, 8, 16).float()
    _ = solve(weight, curvature, constraint, solver).predicted_loss_increase  # compiles its loops, which leaves some
    gc.collect()
    gc.disable()
    try:
        _ = solve(weight, curvature, constraint, solver).predicted_loss_increase
        assert gc.collect() == 0
    finally:
        gc.enable()


@EVERY_PAIR
def test_one_state_serves_many_weights(solver: Solver, curvature: Curvature, constraint: Constraint) -> None:
    state = solver.init(curvature)
    for seed in (1, 2, 1):
        weight = normal(seed, 8, 16)
        again: Solution = solve_with(weight, curvature, constraint, solver, state)
        assert torch.equal(again.weight, solve(weight, curvature, constraint, solver).weight)


@EVERY_PAIR
def test_half_precision_weights_are_solved_in_float32(
    solver: Solver, curvature: Curvature, constraint: Constraint
) -> None:
    weight = normal(1, 8, 16).bfloat16()
    found = solve(weight, curvature, constraint, solver)
    assert found.weight.dtype == torch.float32
    assert torch.equal(found.weight, solve(weight.float(), curvature, constraint, solver).weight)


@EVERY_PAIR
def test_a_weight_of_zeros_stays(solver: Solver, curvature: Curvature, constraint: Constraint) -> None:
    found = solve(torch.zeros(8, 16), curvature, constraint, solver)
    assert not found.weight.any()
    assert found.predicted_loss_increase == 0


def test_dead_inputs_are_solved_with_damping() -> None:
    inputs = correlated_inputs(0, 60, 16)
    inputs[:, [3, 7]] = 0
    gram, weight = Gram.from_inputs(inputs).damped(0.01), normal(1, 6, 16)
    for constraint in (Grid(4, 8), Grid(4, 8, symmetric=False), Sparse(2, 4), Sparse(0.5)):
        for order in ("given", "descending"):
            if order == "descending" and constraint == Sparse(2, 4):
                continue
            solver = ErrorFeedback("descending" if order == "descending" else "given")
            found = solve(weight, gram, constraint, solver).weight
            assert bool(torch.isfinite(found).all())
    # A dead input answers for nothing and nothing answers for it: it is rounded on its own.
    grid = Grid(4, 8)
    found = solve(weight, gram, grid, ErrorFeedback("descending"))
    nearest = grid.decode(grid.round(weight, found.encoded.scales))
    assert torch.equal(found.weight[:, [3, 7]], nearest[:, [3, 7]])


# Refusals


@pytest.mark.parametrize("solver", [ErrorFeedback(), ErrorFeedback("descending"), WhitenedSVD()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tokens", [1, 4, 15])
def test_a_singular_gram_needs_damping(solver: Solver, dtype: torch.dtype, tokens: int) -> None:
    for seed in range(10):
        gram = Gram.from_inputs(normal(seed, tokens, 16).to(dtype))
        with pytest.raises(ConditioningError, match="use more damping"):
            solver.init(gram)
        solver.init(gram.damped(0.01))


def test_an_outlier_input_does_not_make_a_damped_gram_singular() -> None:
    # In float32 alone the pivots of ordinary inputs vanish beside the outlier's; float64 tells them apart.
    scales = torch.ones(16)
    scales[5] = 3e3
    with pytest.warns(ConditioningWarning, match="below the rounding"):
        gram = Gram.from_inputs(normal(0, 200, 16).float() * scales).damped(1e-8)
    with pytest.raises(ConditioningError):
        _ = gram.factor
    found = solve(normal(1, 4, 16).float(), gram, Grid(4, 8), ErrorFeedback())
    assert bool(torch.isfinite(found.weight).all())


@pytest.mark.parametrize(
    ("solver", "curvature", "constraint", "message"),
    [
        (Nearest(), correlated_gram(0, 16), Grid(), "use ErrorFeedback"),
        (Nearest(), Diagonal(values=torch.ones(16)), LowRank(2), "use WhitenedSVD"),
        (ErrorFeedback(), Identity(), Grid(), "needs a Gram, not a Identity"),
        (
            ErrorFeedback(),
            Kronecker(output_factor=torch.ones(8), input_factor=torch.eye(16)),
            Grid(),
            "needs a Gram, not a Kronecker",
        ),
        (ErrorFeedback(), correlated_gram(0, 16), LowRank(2), "no columns to round or drop in a LowRank"),
        (ErrorFeedback("descending"), correlated_gram(0, 16), Sparse(2, 4), 'order="given"'),
        (ErrorFeedback("descending"), correlated_gram(0, 16), Sparse(2, 4) & Grid(), 'order="given"'),
        (WhitenedSVD(), Diagonal(values=torch.ones(8, 16)), LowRank(2), "or a Kronecker, not a Diagonal"),
        (WhitenedSVD(), correlated_gram(0, 16), Grid(), "not Grid"),
    ],
)
def test_what_a_solver_cannot_do_it_refuses_by_name(
    solver: Solver, curvature: Curvature, constraint: Constraint, message: str
) -> None:
    with pytest.raises(UnsupportedProduct, match=message):
        solve(normal(0, 8, 16), curvature, constraint, solver)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@EVERY_PAIR
def test_a_weight_must_be_finite(solver: Solver, curvature: Curvature, constraint: Constraint, value: float) -> None:
    weight = normal(0, 8, 16)
    weight[3, 2] = value
    with pytest.raises(DataError, match="NaN or infinity"):
        solve(weight, curvature, constraint, solver)


@EVERY_PAIR
def test_a_weight_must_fit_in_the_stored_dtype(solver: Solver, curvature: Curvature, constraint: Constraint) -> None:
    weight = normal(0, 8, 16) * 1e12
    with pytest.raises(DataError, match=r"overflows when it is stored as torch\.float16"):
        solve(weight, curvature, constraint.stored_as(torch.float16), solver)


@pytest.mark.parametrize(
    ("shape", "curvature", "constraint"),
    [
        ((8,), Identity(), Grid()),
        ((2, 8, 16), Identity(), Grid()),
        ((8, 15), correlated_gram(0, 16), Grid()),
        ((16, 8), correlated_gram(0, 16), Grid()),
        ((8, 16), Diagonal(values=torch.ones(7, 16)), Grid()),
        ((8, 16), Diagonal(values=torch.ones(8)), Grid()),
        ((8, 14), Identity(), Sparse(2, 4)),
        ((8, 16), Identity(), LowRank(9)),
    ],
    ids=str,
)
def test_shapes_must_fit(shape: tuple[int, ...], curvature: Curvature, constraint: Constraint) -> None:
    solver = ErrorFeedback() if isinstance(curvature, Gram) else Nearest()
    with pytest.raises(OptionError):
        solve(normal(0, *shape), curvature, constraint, solver)


# Scales in float64


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(
    ("solver", "kronecker"),
    [
        (ErrorFeedback(), False),
        (GreedySurgeon(), False),
        (LearnedRounding(steps=20), False),
        (LearnedRounding(TwoSidedFeedback(), steps=20), True),
        (TwoSidedFeedback(), True),
    ],
    ids=lambda value: type(value).__name__,
)
def test_scales_in_float64_are_stored_in_float64(solver: Solver, kronecker: bool, symmetric: bool) -> None:
    weight, grid = normal(5, 12, 16), Grid(4, 8, symmetric=symmetric, headroom=0.25)  # no weight lies half-way
    curvature = correlated_kronecker(3, 12, 16) if kronecker else correlated_gram(3, 16)
    wide = solve(weight, curvature, grid.stored_as(torch.float64), solver)
    narrow = solve(weight, curvature, grid.stored_as(torch.float32), solver)
    scale = wide.encoded.scales.scale
    assert scale.dtype == wide.weight.dtype == torch.float64
    assert not torch.equal(scale, scale.float().double())  # more digits than float32 has
    assert torch.equal(narrow.encoded.scales.scale, narrow.encoded.scales.scale.float().double())
    assert torch.equal(wide.weight, grid.stored_as(torch.float64).decode(wide.encoded))
    assert wide.predicted_loss_increase == pytest.approx(narrow.predicted_loss_increase, rel=1e-4)
