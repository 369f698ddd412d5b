"""Learned rounding: its gradient against autograd, its end against every single change, its start as the floor."""

import math

import pytest
import torch
from torch import Tensor

from hesse.constraints import Grid, GridCode, Sparse
from hesse.curvature import Diagonal, Gram, Kronecker
from hesse.errors import UnsupportedProduct
from hesse.solvers import ErrorFeedback, LearnedRounding, TwoSidedFeedback, solve
from hesse.solvers.sweeps.row_flips import settle_rows
from hesse.testing import normal

GRIDS = [Grid(2, 4, headroom=0.25), Grid(3, -1, signed=True, headroom=1.0), Grid(3, 5, symmetric=False)]


def factor(seed: int, width: int) -> Tensor:
    rows = normal(seed, 3 * width, width) * normal(seed + 1, width).exp() + normal(seed + 2, 3 * width, 1)
    return rows.T @ rows / len(rows)


def gram(seed: int, width: int) -> Gram:
    return Gram(second_moment=factor(seed, width), tokens=3 * width).damped(0.01)


def kronecker(seed: int, rows: int, columns: int) -> Kronecker:
    return Kronecker(output_factor=factor(seed, rows), input_factor=factor(seed + 5, columns)).with_damped_factors(
        0.1, 0.01
    )


def single_changes(code: GridCode, grid: Grid, weight: Tensor, curvature: Gram | Kronecker) -> Tensor:
    """The least cost of the weight with one code changed to any other, for each code (out, in), less the cost now."""
    found = torch.full(weight.shape, math.inf).double()
    now = curvature.quadratic(grid.decode(code).double() - weight)
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            for other in range(grid.lowest, grid.highest + 1):
                if other != int(code.codes[i, j]):
                    codes = code.codes.clone()
                    codes[i, j] = other
                    changed = grid.decode(GridCode(codes, code.scales)).double() - weight
                    found[i, j] = min(float(found[i, j]), curvature.quadratic(changed) - now)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grid", GRIDS)
def test_when_rows_are_settled_no_single_change_helps(grid: Grid, dtype: torch.dtype) -> None:
    grid, curvature = grid.stored_as(dtype), gram(1, 9)
    for seed in range(3):
        weight = normal(10 + seed, 4, 9)
        start = grid.encode(weight)
        settled = settle_rows(start, curvature, grid, weight)
        costs = [curvature.quadratic(grid.decode(code).double() - weight) for code in (settled, start)]
        assert costs[0] < costs[1]
        assert single_changes(settled, grid, weight, curvature).min() > -1e-9 * costs[0]
        assert settled.scales is start.scales


def test_inputs_that_are_always_zero_stay_as_they_are() -> None:
    moment = factor(2, 8)
    moment[3] = moment[:, 3] = 0
    weight, grid = normal(3, 4, 8), Grid(3, 4)
    start = grid.encode(weight)
    settled = settle_rows(start, Gram(second_moment=moment, tokens=24), grid, weight)
    assert torch.equal(settled.codes[:, 3], start.codes[:, 3])


@pytest.mark.parametrize("grid", GRIDS)
def test_the_descent_is_that_of_autograd_and_torchs_adam(grid: Grid) -> None:
    grid, curvature, weight = grid.stored_as(torch.float64), gram(4, 10), normal(5, 6, 10)
    solver, start = LearnedRounding(steps=200), grid.encode(weight)
    found = solver.learn(curvature, weight, grid, start)

    moment, step = curvature.second_moment, grid.expand(start.scales.scale, 10)
    zero = 0 if start.scales.zero_point is None else grid.expand(start.scales.zero_point, 10)
    codes = start.codes.double()
    slope = ((codes - zero) * step - weight) @ moment * step
    other = (codes - slope.sign()).clamp(grid.lowest, grid.highest)
    logits = torch.full_like(weight, math.log(1 / 2), requires_grad=True)  # of (0.3 + 0.1) / 1.2 = 1 / 3
    optimiser = torch.optim.Adam([logits], lr=0.02)
    level = step.square() * moment.diagonal().mean()
    for number in range(200):
        h = (torch.sigmoid(logits) * 1.2 - 0.1).clamp(0, 1)
        difference = (codes + h * (other - codes) - zero) * step - weight
        done = (number / 200 - 0.2) / 0.8
        exponent = 2 + 18 * (1 + math.cos(math.pi * done)) / 2
        ends = (1 - (2 * h - 1).abs() ** exponent).sum() if done > 0 else 0 * h.sum()
        # ½ dᵀHd in units of each weight's own step: what its gradient is divided by does not depend on the others'.
        pull = (difference @ moment * step / level).detach() * (h * (other - codes))
        optimiser.zero_grad()
        (pull.sum() + ends).backward()
        optimiser.step()
    assert torch.equal(found.codes, torch.where(logits > 0, other, codes).to(torch.int8))
    assert 0 < (found.codes != start.codes).sum() < found.codes.numel()


@pytest.mark.parametrize("grid", GRIDS)
def test_never_worse_than_the_start_and_mostly_better(grid: Grid) -> None:
    saved = []
    for seed in range(4):
        weight = normal(30 + seed, 16, 24).float()
        for curvature, start in (
            (gram(7 + seed, 24), ErrorFeedback("descending")),
            (kronecker(8 + seed, 16, 24), TwoSidedFeedback()),
        ):
            before = solve(weight, curvature, grid, start)
            found = solve(weight, curvature, grid, LearnedRounding(start, steps=100))
            assert found.predicted_loss_increase <= before.predicted_loss_increase * (1 + 1e-6)
            assert torch.equal(found.weight, grid.decode(found.encoded))
            saved.append(found.predicted_loss_increase / before.predicted_loss_increase)
    assert sum(saved) / len(saved) < 0.99


def test_under_a_kronecker_no_single_change_helps() -> None:
    curvature, weight, grid = kronecker(9, 5, 6), normal(40, 5, 6).float(), Grid(3, -1, headroom=0.5)
    found = solve(weight, curvature, grid, LearnedRounding(TwoSidedFeedback(), steps=50))
    least = single_changes(found.encoded, grid, weight.double(), curvature).min()
    assert least > -1e-4 * found.predicted_loss_increase


def test_it_comes_near_the_best_of_all_codes() -> None:
    """Brute force over all 4⁶ codes of a row."""
    grid, curvature = Grid(2, -1, headroom=0.5), gram(11, 6)
    ratios = []
    for seed in range(6):
        weight = normal(50 + seed, 1, 6)
        found = solve(weight, curvature, grid, LearnedRounding(ErrorFeedback("descending"), steps=100))
        every = torch.cartesian_prod(*[torch.arange(-2, 2)] * 6).double() * found.encoded.scales.scale.double()
        best = float(curvature.row_quadratics(every - weight).min())
        assert found.predicted_loss_increase >= best * (1 - 1e-6)
        ratios.append(found.predicted_loss_increase / best)
    assert sum(ratios) / 6 < 1.25


def test_refusals() -> None:
    weight = normal(0, 4, 8)
    with pytest.raises(UnsupportedProduct, match="LearnedRounding needs a Gram or a Kronecker, not a Diagonal"):
        solve(weight, Diagonal(values=torch.ones(4, 8)), Grid(), LearnedRounding())
    with pytest.raises(UnsupportedProduct, match="LearnedRounding solves Grid, not Sparse"):
        solve(weight, gram(0, 8), Sparse(0.5), LearnedRounding())
    with pytest.raises(UnsupportedProduct, match="ErrorFeedback needs a Gram, not a Kronecker"):
        solve(weight, kronecker(0, 4, 8), Grid(), LearnedRounding())
