"""Codebooks and exact outliers beside them: against every partition, against grids, and in sums."""

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hesse.constraints import Codebook, Grid, Plus, Sparse
from hesse.curvature import Diagonal
from hesse.errors import OptionError
from hesse.solvers import Nearest, solve
from hesse.testing import normal, seeds


def cost(weight: Tensor, member: Tensor, metric: Tensor) -> Tensor:
    return (metric * (member - weight).square()).sum(1)


def best_partition(row: Tensor, metric: Tensor, parts: int) -> float:
    """The least cost of a row over all ways to cut its sorted weights into parts, each at its weighted mean."""
    order = row.argsort()
    row, metric = row[order], metric[order]
    best = float("inf")
    for cuts in combinations(range(1, len(row)), parts - 1):
        total = 0.0
        for start, stop in zip((0, *cuts), (*cuts, len(row)), strict=True):
            w, m = row[start:stop], metric[start:stop]
            total += float((m * (w - (m * w).sum() / m.sum()).square()).sum())
        best = min(best, total)
    return best


@pytest.mark.parametrize("bits", [1, 2])
def test_the_best_of_all_partitions(bits: int) -> None:
    weight, metric = normal(0, 12, 10), normal(1, 12, 10).square() + 1e-3
    metric[3, ::2] = 0
    found = Codebook(bits, dtype=torch.float64).nearest(weight, metric)
    found_best = [best_partition(w, m, 1 << bits) for w, m in zip(weight, metric, strict=True)]
    best = torch.tensor(found_best, dtype=torch.float64)
    torch.testing.assert_close(cost(weight, found, metric), best)


@settings(max_examples=25, deadline=None)
@given(seed=seeds, bits=st.integers(1, 4), weighted=st.booleans())
def test_laws(seed: int, bits: int, weighted: bool) -> None:
    weight = normal(seed, 5, 40)
    metric = normal(seed + 1, 5, 40).square() if weighted else torch.ones(5, 40).double()
    codebook = Codebook(bits, dtype=torch.float64)
    code = codebook.encode(weight, metric if weighted else None)
    member = codebook.decode(code)
    assert code.codes.dtype == torch.uint8
    assert int(code.codes.max()) < 1 << bits
    assert bool((code.values.diff(dim=1) >= 0).all())
    torch.testing.assert_close(codebook.nearest(member, metric), member)  # idempotent
    if bits > 1:
        grid = Grid(bits, -1, symmetric=False, dtype=torch.float64).nearest(weight)
        assert bool((cost(weight, member, metric) <= cost(weight, grid, metric) * (1 + 1e-9)).all())
    distances = (weight[:, :, None] - code.values[:, None, :]).abs()
    torch.testing.assert_close((member - weight).abs(), distances.amin(-1))


def test_values_are_stored_in_the_dtype_and_rows_of_few_values_are_exact() -> None:
    codebook = Codebook(2, dtype=torch.bfloat16)
    code = codebook.encode(normal(2, 6, 30).float())
    assert torch.equal(code.values, code.values.bfloat16().float())
    few = torch.tensor([-1.5, 0.25, 4.0]).repeat(4, 10)
    assert torch.equal(Codebook(2).nearest(few), few)
    assert torch.equal(Codebook(2).nearest(torch.zeros(2, 8)), torch.zeros(2, 8))
    assert Codebook(3).bits_per_weight(torch.Size([10, 64])) == 3 + 32 * 8 / 64


def test_refusals() -> None:
    with pytest.raises(OptionError, match="a Codebook has 1 to 8"):
        Codebook(9)
    with pytest.raises(OptionError, match=r"a codebook of 16 values is as large as a row of 12 weights, or larger"):
        solve(normal(0, 3, 12), Diagonal(values=torch.ones(3, 12)), Codebook(4), Nearest())


def test_outliers_are_exact_and_never_make_it_worse() -> None:
    weight = normal(3, 8, 50)
    weight[2, 7], weight[5, 11] = 40.0, -33.0
    metric = normal(4, 8, 50).square() + 0.1
    both = (Codebook(2) + Sparse(0.98)).stored_as(torch.float64)
    assert isinstance(both, Plus)
    found = solve(weight, Diagonal(values=metric), both, Nearest())
    exact = found.encoded.correction.mask
    assert int(exact.sum()) == round(0.02 * weight.numel())
    assert bool(exact[2, 7])
    assert bool(exact[5, 11])
    torch.testing.assert_close(found.weight[exact], weight[exact])
    alone = solve(weight, Diagonal(values=metric), Codebook(2).stored_as(torch.float64), Nearest())
    assert found.predicted_loss_increase < 0.7 * alone.predicted_loss_increase


def test_where_few_weights_are_kept_their_places_are_counted_one_by_one() -> None:
    shape = torch.Size([16, 256])
    assert Sparse(0.5).bits_per_weight(shape) == 0.5 * 32 + 1
    assert Sparse(0.99).bits_per_weight(shape) == pytest.approx(0.01 * (32 + 8))
