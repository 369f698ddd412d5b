"""Bits mixed over groups of columns: exact means, signs, the sweep written out, SliM-LLM's choice by brute force."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hesse.constraints import Grid, GroupBits, MixedGrid, Sparse
from hesse.constraints.mixed_grid import Signs
from hesse.curvature import Gram, Identity
from hesse.errors import OptionError, UnsupportedProduct
from hesse.methods.constraint_options import ConstraintOptions
from hesse.methods.constraint_parts import GridOptions, LowRankOptions
from hesse.solvers import ErrorFeedback, Nearest, SalientBits, solve
from hesse.testing import normal, seeds


def gram(seed: int, width: int) -> Gram:
    inputs = normal(seed, 4 * width, width) * normal(seed + 1, width).exp() + normal(seed + 2, 4 * width, 1)
    return Gram.from_inputs(inputs).damped(0.01)


def uneven(seed: int, rows: int, columns: int) -> Tensor:
    """A weight whose groups of four columns matter differently."""
    return normal(seed, rows, columns) * normal(seed + 1, columns // 4).exp().repeat_interleave(4)


@settings(max_examples=20, deadline=None)
@given(seed=seeds, bits=st.integers(2, 7), columns=st.integers(1, 40), width=st.sampled_from([-1, 1, 4, 16]))
def test_the_mean_of_the_bits_is_exact(seed: int, bits: int, columns: int, width: int) -> None:
    mixed = MixedGrid(Grid(bits, width))
    salience = normal(seed, columns).square()
    groups = mixed.base.groups(columns)
    for k, grid in enumerate(mixed.choices(salience)):
        assert len(grid.bits) == groups
        assert sum(grid.at(column).bits for column in range(columns)) == bits * columns
        assert sorted(grid.bits) == [bits - 1] * k + [bits] * (groups - 2 * k) + [bits + 1] * k
    assert k == (columns // mixed.base.group_width(columns)) // 2
    per_group = (
        torch.zeros(groups).double().index_add_(0, torch.arange(columns) // mixed.base.group_width(columns), salience)
    )
    most, least = torch.tensor(grid.bits) > bits, torch.tensor(grid.bits) < bits
    if k:
        assert per_group[most].min() >= per_group[least].max()


def test_one_bit_is_a_sign_of_the_best_size() -> None:
    weight = normal(0, 5, 11)
    found = Signs(group_size=4, dtype=torch.float64).nearest(weight)
    for start, stop in ((0, 4), (4, 8), (8, 11)):
        part = weight[:, start:stop]
        best = part.abs().mean(1, keepdim=True)  # of all ±s the least Σ (w ∓ s)²
        torch.testing.assert_close(found[:, start:stop], part.sign() * best)
    assert torch.equal(Signs(group_size=4).nearest(torch.zeros(2, 8)).abs(), torch.full((2, 8), 0.5))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [(3, 1, 2), (4, 3, 2)])
@pytest.mark.parametrize("order", ["given", "descending"])
def test_each_group_is_rounded_by_its_own_grid(bits: tuple[int, ...], symmetric: bool, order: str) -> None:
    """Optimal Brain Surgeon over columns with H⁻¹ written out; scales of what a group has become, or of the weight."""
    base = Grid(3, 4, symmetric=symmetric, headroom=0.3, dtype=torch.float64)
    mixed, curvature = GroupBits(base, bits, dtype=torch.float64), gram(1, 10)
    for seed in range(3):
        weight = normal(20 + seed, 6, 10)
        columns = list(range(10))
        if order == "descending":
            columns = torch.argsort(curvature.diagonal(), descending=True, stable=True).tolist()
        work, wanted = weight.clone(), torch.zeros_like(weight)
        inverse = torch.linalg.inv(curvature.second_moment + curvature.damping * torch.eye(10).double())
        for j in columns:
            grid, start = mixed.at(j), j // 4 * 4
            if order == "descending" or j % 4 == 0:
                scales = grid.fit((weight if order == "descending" else work)[:, start : start + 4])
            zero = None if scales.zero_point is None else scales.zero_point[:, 0]
            codes = grid.codes(work[:, j], scales.scale[:, 0], zero)
            wanted[:, j] = grid.values(codes, scales.scale[:, 0], zero)
            work -= torch.outer((work[:, j] - wanted[:, j]) / inverse[j, j], inverse[j])
            inverse = inverse - torch.outer(inverse[j], inverse[j]) / inverse[j, j]
            inverse[j] = inverse[:, j] = 0
        found = solve(weight, curvature, mixed, ErrorFeedback("descending" if order == "descending" else "given", 4))
        plain = mixed.decode(mixed.round(weight, found.encoded.scales))
        costs = [curvature.row_quadratics(member - weight) for member in (wanted, plain)]
        torch.testing.assert_close(found.weight, torch.where((costs[1] < costs[0])[:, None], plain, wanted))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_best_of_all_splits_and_so_never_worse_than_one_width(bits: int) -> None:
    curvature, grid = gram(3, 24), Grid(bits, 4, headroom=0.25)
    inner = ErrorFeedback("descending")
    saved = []
    for seed in range(4):
        weight = uneven(30 + seed, 16, 24)
        found = solve(weight, curvature, MixedGrid(grid), SalientBits(inner, patience=9))
        upper = torch.linalg.cholesky(
            torch.linalg.inv(
                curvature.second_moment[inner.init(curvature).order][:, inner.init(curvature).order]
                + curvature.damping * torch.eye(24).double()
            ),
            upper=True,
        )
        pivots = upper.diagonal()[torch.argsort(inner.init(curvature).order)]
        choices = list(MixedGrid(grid).choices((weight / pivots).square().sum(0)))
        costs = [solve(weight, curvature, choice, inner).predicted_loss_increase for choice in choices]
        assert found.predicted_loss_increase == pytest.approx(min(costs))
        assert tuple(found.encoded.bits.tolist()) == choices[costs.index(min(costs))].bits
        uniform = solve(weight, curvature, grid, inner).predicted_loss_increase
        assert costs[0] == pytest.approx(uniform)
        saved.append(found.predicted_loss_increase / uniform)
    assert max(saved) <= 1
    assert min(saved) < 0.8  # where groups matter so differently


def test_the_compiled_sweep_is_the_plain_one() -> None:
    weight, curvature = uneven(5, 24, 160), gram(6, 160)
    mixed = MixedGrid(Grid(2, 16, headroom=0.25))
    found = solve(weight.float(), curvature, mixed, SalientBits())
    plain = solve(weight, curvature, mixed.stored_as(torch.float32), SalientBits())
    assert found.predicted_loss_increase == pytest.approx(plain.predicted_loss_increase, rel=0.05)
    assert found.encoded.bits.float().mean() == 2


def test_what_it_takes_to_store_and_what_is_nearest() -> None:
    mixed, weight = MixedGrid(Grid(3, 4)), uneven(7, 8, 16)
    assert mixed.bits_per_weight(torch.Size([8, 16])) == 3 + 32 / 4 + 2 * 4 / (8 * 16)
    found = solve(weight, Identity(), mixed, Nearest())
    each = [(grid.nearest(weight) - weight).square().sum() for grid in mixed.choices(weight.square().sum(0))]
    torch.testing.assert_close((found.weight - weight).square().sum(), min(each), rtol=1e-6, atol=0)
    assert mixed.stored_as(torch.bfloat16).base.dtype == torch.bfloat16


def test_refusals() -> None:
    with pytest.raises(OptionError, match="groups of mixed bits have a mean of 2 to 7"):
        MixedGrid(Grid(8))
    with pytest.raises(UnsupportedProduct, match="SalientBits solves MixedGrid, not Sparse"):
        solve(normal(0, 4, 8), gram(0, 8), Sparse(0.5), SalientBits())
    with pytest.raises(OptionError, match="only a grid has groups of mixed kind, not a LowRank"):
        ConstraintOptions(low_rank=LowRankOptions(), basis="mixed").build()
    assert ConstraintOptions(grid=GridOptions(), basis="mixed").build() == MixedGrid(Grid())
