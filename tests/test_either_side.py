"""Groups along inputs or outputs: the algebra, GPTQ with scales along outputs written out, AdaDim's choice."""

import pytest
import torch
from torch import Tensor

from hesse.constraints import AlongOutputs, EitherSide, Grid, Sparse
from hesse.curvature import Gram, Identity
from hesse.errors import OptionError, UnsupportedProduct
from hesse.methods.constraint_options import ConstraintOptions
from hesse.methods.constraint_parts import GridOptions, LowRankOptions
from hesse.solvers import CheaperSide, ErrorFeedback, Nearest, solve
from hesse.testing import normal

GRIDS = [Grid(3, 4, headroom=0.25), Grid(4, -1, signed=True, headroom=0.5), Grid(3, 5, symmetric=False)]


def gram(seed: int, width: int) -> Gram:
    inputs = normal(seed, 4 * width, width) * normal(seed + 1, width).exp() + normal(seed + 2, 4 * width, 1)
    return Gram.from_inputs(inputs).damped(0.01)


def swept(weight: Tensor, curvature: Gram, grid: Grid, order: list[int]) -> Tensor:
    """Optimal Brain Surgeon over columns, whose scales are fitted to what each has become; H⁻¹ by elimination."""
    work, found = weight.clone(), torch.zeros_like(weight)
    inverse = torch.linalg.inv(curvature.second_moment + curvature.damping * torch.eye(len(order)).double())
    for j in order:
        found[:, j] = grid.nearest(work[:, j : j + 1].T)[0]
        work -= torch.outer((work[:, j] - found[:, j]) / inverse[j, j], inverse[j])
        inverse = inverse - torch.outer(inverse[j], inverse[j]) / inverse[j, j]
        inverse[j] = inverse[:, j] = 0
    return found


@pytest.mark.parametrize("grid", GRIDS)
def test_along_outputs_is_the_grid_of_the_transposed_weight(grid: Grid) -> None:
    grid, weight = grid.stored_as(torch.bfloat16), normal(0, 12, 7)
    along = AlongOutputs(grid, dtype=torch.bfloat16)
    assert torch.equal(along.nearest(weight), grid.nearest(weight.T).T)
    assert along.bits_per_weight(torch.Size([12, 7])) == grid.bits_per_weight(torch.Size([7, 12]))
    assert along.stored_as(torch.float16).base.dtype == torch.float16


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("order", ["given", "descending"])
def test_error_feedback_with_scales_along_outputs(grid: Grid, order: str) -> None:
    grid = grid.stored_as(torch.float64)
    curvature = gram(1, 10)
    solver = ErrorFeedback("descending" if order == "descending" else "given", block_size=3)
    falling = torch.argsort(curvature.diagonal(), descending=True, stable=True).tolist()
    for seed in range(3):
        weight = normal(10 + seed, 8, 10)
        along = AlongOutputs(grid, dtype=torch.float64)
        found = solve(weight, curvature, along, solver)
        wanted = swept(weight, curvature, grid, falling if order == "descending" else list(range(10)))
        plain = along.decode(along.round(weight, found.encoded.scales))  # which a row takes where it costs less
        costs = [curvature.row_quadratics(member - weight) for member in (wanted, plain)]
        cheaper = torch.where((costs[1] < costs[0])[:, None], plain, wanted)
        torch.testing.assert_close(found.weight, cheaper)


def test_the_compiled_sweep_is_the_plain_one() -> None:
    weight, curvature = normal(2, 24, 150), gram(3, 150)
    along = AlongOutputs(Grid(3, 8, headroom=0.25))
    found = solve(weight.float(), curvature, along, ErrorFeedback("descending"))
    plain = solve(weight, curvature, along.stored_as(torch.float32), ErrorFeedback("descending"))
    assert found.predicted_loss_increase == pytest.approx(plain.predicted_loss_increase, rel=0.02)


@pytest.mark.parametrize("solver", [CheaperSide(), CheaperSide(ErrorFeedback("descending"))])
def test_the_side_on_which_nothing_stands_out_is_taken(solver: CheaperSide) -> None:
    """AdaDim's claim: inputs whose weights stand out take the scales of rows with them, and not those of columns."""
    curvature, grid = gram(4, 32), Grid(3, 16, headroom=0.25)
    for seed in range(3):
        weight = normal(20 + seed, 32, 32)
        for outputs, loud in ((True, weight.clone()), (False, weight.clone())):
            (loud.T if outputs else loud)[::11] *= 10
            found = solve(loud, curvature, EitherSide(grid), solver)
            assert found.encoded.along_outputs == outputs
            rows = grid.nearest(loud) if solver.inner is None else solve(loud, curvature, grid, solver.inner).weight
            rows_cost = curvature.quadratic(rows - loud)
            assert found.predicted_loss_increase <= rows_cost * (1 + 1e-9)
            assert not outputs or found.predicted_loss_increase < 0.7 * rows_cost


def test_without_a_curvature_the_nearer_side_is_taken() -> None:
    weight, either = normal(5, 16, 24), EitherSide(Grid(3, 8))
    weight[:, ::5] *= 9
    found = solve(weight, Identity(), either, Nearest())
    sides = [(either.side(along).nearest(weight) - weight).square().sum() for along in (False, True)]
    assert found.encoded.along_outputs
    torch.testing.assert_close((found.weight - weight).square().sum(), min(sides))
    assert either.bits_per_weight(torch.Size([16, 24])) == 3 + 32 / 8 + 1 / (16 * 24)


def test_refusals() -> None:
    with pytest.raises(UnsupportedProduct, match="CheaperSide solves EitherSide, not Sparse"):
        solve(normal(0, 4, 8), gram(0, 8), Sparse(0.5), CheaperSide())
    with pytest.raises(OptionError, match="only a grid has groups of either-side kind, not a LowRank"):
        ConstraintOptions(low_rank=LowRankOptions(), basis="either-side").build()
    assert ConstraintOptions(grid=GridOptions(), basis="either-side").build() == EitherSide(Grid())
