"""Grids in scaled and in rotated bases: the algebra, the claims of AWQ and QuIP on constructed weights, refusals."""

import pytest
import torch
from torch import Tensor

from hesse.constraints import Grid, Rotated, ScaledColumns
from hesse.constraints.rotated import rotate_rows
from hesse.curvature import Gram, Identity
from hesse.errors import OptionError, UnsupportedProduct
from hesse.methods.constraint_options import ConstraintOptions
from hesse.methods.constraint_parts import GridOptions, LowRankOptions, OutlierOptions
from hesse.solvers import ActivationAware, ErrorFeedback, Incoherent, Nearest, solve
from hesse.testing import normal


@pytest.mark.parametrize("size", [1, 7, 12, 64, 96])
def test_a_rotation_keeps_lengths_and_comes_back(size: int) -> None:
    rows = normal(0, 5, size)
    turned = rotate_rows(rows, 3)
    torch.testing.assert_close(turned @ turned.T, rows @ rows.T)
    torch.testing.assert_close(rotate_rows(turned, 3, back=True), rows)
    if size > 7:
        assert (turned - rows).abs().max() > 0.1
        assert not torch.allclose(rotate_rows(rows, 4), turned)


def test_the_quadratic_is_the_same_in_every_basis() -> None:
    constraint, weight, inputs = Rotated(Grid(4, 8)), normal(1, 12, 24), normal(2, 60, 24)
    gram = Gram.from_inputs(inputs)
    turned = Gram(second_moment=constraint.rotate_inputs(gram.second_moment), tokens=60)
    assert turned.quadratic(constraint.rotate_weight(weight)) == pytest.approx(gram.quadratic(weight))
    near = Rotated(Grid(8, 4)).stored_as(torch.float64).nearest(weight)
    torch.testing.assert_close(near, weight, rtol=0, atol=0.03)
    assert Rotated(Grid(4, 8)).bits_per_weight(torch.Size([4, 16])) == Grid(4, 8).bits_per_weight(torch.Size([4, 16]))


def spiked(seed: int) -> tuple[Tensor, Gram]:
    """A weight with a few entries that stand out, and inputs of which a few do."""
    weight = normal(seed, 32, 64)
    weight.view(-1)[torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(seed))[:40]] *= 12
    sizes = torch.ones(64).double()
    sizes[::16] = 10
    return weight, Gram.from_inputs(normal(seed + 1, 256, 64) * sizes).damped(0.01)


def test_few_codes_round_better_where_nothing_stands_out() -> None:
    """QuIP's claim, at 2 bits."""
    plain = turned = 0.0
    for seed in range(4):
        weight, gram = spiked(seed)
        grid = Grid(2, -1, headroom=0.25)
        plain += solve(weight, gram, grid, ErrorFeedback("descending")).predicted_loss_increase
        turned += solve(weight, gram, Rotated(grid), Incoherent(ErrorFeedback("descending"))).predicted_loss_increase
    assert turned < 0.6 * plain


def test_columns_of_large_inputs_are_rounded_more_finely() -> None:
    """AWQ's claim: one column in sixteen carries most of the error."""
    plain = scaled = 0.0
    for seed in range(4):
        weight, gram = normal(seed, 32, 64), spiked(seed)[1]
        grid = Grid(3, 16)
        found = solve(weight, gram, ScaledColumns(grid), ActivationAware())
        scaled += found.predicted_loss_increase
        plain += gram.quadratic(grid.nearest(weight) - weight)
        error = (found.weight - weight).square().mean(0)
        assert error[::16].mean() < 0.8 * error.mean()
    assert scaled < 0.8 * plain


def test_scaling_is_never_worse_than_not_to() -> None:
    for seed in range(5):
        weight, inputs = normal(seed, 8, 20), normal(seed + 9, 50, 20) * normal(seed + 10, 20).exp()
        inputs[:, 3] = 0  # an input that is always zero
        gram, grid = Gram.from_inputs(inputs), Grid(3, 8)
        found = solve(weight, gram, ScaledColumns(grid), ActivationAware())
        assert found.predicted_loss_increase <= gram.quadratic(grid.nearest(weight) - weight) * (1 + 1e-5)
        assert torch.isfinite(found.weight).all()
    silent = Gram(second_moment=torch.zeros(20, 20), tokens=5)
    assert torch.isfinite(solve(weight.float(), silent, ScaledColumns(grid), ActivationAware()).weight).all()
    plain = ScaledColumns(grid).nearest(weight)
    torch.testing.assert_close(plain, grid.nearest(weight))
    assert ScaledColumns(Grid(4, 8)).bits_per_weight(torch.Size([16, 32])) == pytest.approx(
        Grid(4, 8).bits_per_weight(torch.Size([16, 32])) + 2
    )


def test_refusals() -> None:
    weight, gram = normal(0, 4, 8), Gram.from_inputs(normal(1, 20, 8))
    with pytest.raises(UnsupportedProduct, match="ActivationAware needs a Gram"):
        solve(weight, Identity(), ScaledColumns(Grid()), ActivationAware())
    with pytest.raises(UnsupportedProduct, match="ActivationAware solves ScaledColumns, not Grid"):
        solve(weight, gram, Grid(), ActivationAware())
    with pytest.raises(UnsupportedProduct, match="Incoherent solves Rotated, not Grid"):
        solve(weight, gram, Grid(), Incoherent())
    with pytest.raises(UnsupportedProduct, match="Incoherent needs a Gram"):
        solve(weight, Identity(), Rotated(Grid()), Incoherent())
    with pytest.raises(OptionError, match="outliers are the unchanged weights of a grid"):
        ConstraintOptions(outliers=OutlierOptions()).build()
    with pytest.raises(OptionError, match="a constraint needs one of grid, codebook"):
        ConstraintOptions(basis="rotated").build()
    with pytest.raises(OptionError, match="a rotated basis is for a single constraint"):
        ConstraintOptions(grid=GridOptions(), low_rank=LowRankOptions(), basis="rotated").build()
    torch.testing.assert_close(
        solve(weight, Identity(), Rotated(Grid(4, 4)), Nearest()).weight, Rotated(Grid(4, 4)).nearest(weight)
    )
