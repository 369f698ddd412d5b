"""Sums of rank-one matrices: whole, in blocks, and in a window that slides."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hesse.curvature import BlockAccumulator, BlockRankOneSum, Curvature, GradientWindow, RankOneSum
from hesse.errors import ConditioningError, DataError, OptionError
from hesse.testing import CurvatureLaws, normal, seeds


def moment(gradients: Tensor) -> Tensor:
    flat = gradients.flatten(1)
    return flat.T @ flat / len(flat)


class TestRankOneSum(CurvatureLaws):
    offers = ("solve", "inverse_diagonal", "diagonal", "trace", "rank", "save")
    gradients = normal(0, 5, 3, 4)

    def build(self, dtype: torch.dtype) -> Curvature:
        return RankOneSum.from_gradients(self.gradients.to(dtype))

    def dense(self) -> Tensor:
        return moment(self.gradients)


class TestRankOneSumOfOneVector(TestRankOneSum):
    gradients = normal(1, 1, 7)


class TestBlockRankOneSum(CurvatureLaws):
    offers = ("solve", "inverse_diagonal", "diagonal", "trace", "rank", "save")
    gradients, block_size = normal(2, 9, 3, 4), 5

    def build(self, dtype: torch.dtype) -> Curvature:
        return BlockRankOneSum.from_gradients(self.gradients.to(dtype), self.block_size)

    def dense(self) -> Tensor:
        flat = self.gradients.flatten(1)
        return torch.block_diag(*(moment(part) for part in flat.split(self.block_size, dim=1)))


class TestBlocksOfFewGradients(TestBlockRankOneSum):
    gradients = normal(3, 2, 3, 4)


class TestSingularBlocks(TestBlockRankOneSum):
    gradients = normal(3, 5, 3, 4) * torch.tensor([1.0, 0.0, 1.0, 1.0])


class TestBlocksOfOne(TestBlockRankOneSum):
    block_size = 1


# Exactness by name


@settings(max_examples=25, deadline=None)
@given(seed=seeds, number=st.integers(1, 12), block_size=st.sampled_from([10, 11, 50]))
def test_one_block_of_everything_is_the_whole(seed: int, number: int, block_size: int) -> None:
    gradients, vector = normal(seed, number, 10), normal(seed + 1, 2, 10)
    whole = RankOneSum.from_gradients(gradients).damped(0.1)
    blocks = BlockRankOneSum.from_gradients(gradients, block_size).damped(0.1)
    for ours, theirs in (
        (whole.matvec(vector), blocks.matvec(vector)),
        (whole.solve(vector), blocks.solve(vector)),
        (whole.inverse_diagonal(), blocks.inverse_diagonal()),
    ):
        torch.testing.assert_close(ours, theirs)


@settings(max_examples=25, deadline=None)
@given(seed=seeds, size=st.integers(1, 6), moves=st.integers(1, 20))
def test_a_window_that_slid_is_one_built_from_scratch(seed: int, size: int, moves: int) -> None:
    stream, vector = normal(seed, moves, 2, 5), normal(seed + 1, 2, 5)
    window = GradientWindow(size, (2, 5), dtype=torch.float64)
    for gradient in stream:
        window.push(gradient)
    assert len(window) == min(size, moves)
    slid, scratch = window.curvature(0.3), RankOneSum.from_gradients(stream[-size:]).with_damping(0.3)
    torch.testing.assert_close(slid.matvec(vector), scratch.matvec(vector))
    torch.testing.assert_close(slid.solve(vector), scratch.solve(vector))
    torch.testing.assert_close(slid.inverse_diagonal(), scratch.inverse_diagonal())


def test_entries_of_the_inverse() -> None:
    curvature = RankOneSum.from_gradients(normal(4, 5, 3, 4)).damped(0.2)
    inverse = torch.linalg.inv(curvature.matrix() + curvature.damping * torch.eye(12))
    for row, column in ((0, 0), (3, 7), (7, 3), (11, 11)):
        assert curvature.inverse_entry(row, column) == pytest.approx(float(inverse[row, column]))
    torch.testing.assert_close(curvature.inverse_diagonal().flatten(), inverse.diagonal())  # from `whitened`, now


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_gradient_of_the_window_at_small_damping(dtype: torch.dtype) -> None:
    gradients = normal(5, 8, 20_000)
    exact = RankOneSum.from_gradients(gradients).damped(1e-4, of="range")
    curvature = RankOneSum.from_gradients(gradients.to(dtype)).damped(1e-4, of="range")
    coefficients = torch.eye(8)[:3].to(dtype)
    core = exact.damping * torch.eye(8) + gradients @ gradients.T / 8
    expected = torch.linalg.solve(core, coefficients.double().T).T @ gradients
    solved = curvature.solve_in_span(coefficients)
    assert solved.dtype == dtype
    tolerance = 1e-11 if dtype == torch.float64 else 2e-6
    assert float((solved - expected).norm() / expected.norm()) < tolerance


def test_long_dot_products_keep_their_digits() -> None:
    # One sum in float32 over so many equal signs would lose four digits or more.
    gradients = normal(6, 2, 3_000_000).float().abs()
    curvature, exact = RankOneSum.from_gradients(gradients), gradients.double()
    torch.testing.assert_close(curvature.inner_products, exact @ exact.T, rtol=4e-7, atol=0)
    vector = normal(7, 3_000_000).float().abs()
    torch.testing.assert_close(curvature.along(vector), exact @ vector.double(), rtol=4e-7, atol=0)


def test_gradients_on_disk(tmp_path: Path) -> None:
    gradients = normal(8, 6, 10_000).float()
    gradients.numpy().tofile(tmp_path / "gradients")
    mapped = torch.from_numpy(np.memmap(tmp_path / "gradients", np.float32, "r+", shape=(6, 10_000)))
    there, here = RankOneSum.from_gradients(mapped).damped(0.1), RankOneSum.from_gradients(gradients).damped(0.1)
    vector = normal(9, 10_000).float()
    assert torch.equal(there.solve(vector), here.solve(vector))
    assert torch.equal(there.inverse_diagonal(), here.inverse_diagonal())


def test_a_removal_costs_what_removing_does() -> None:
    """½ w² / [H⁻¹]ⱼⱼ is the least of the quadratic model with weight j at zero."""
    curvature = RankOneSum.from_gradients(normal(10, 30, 6)).damped(0.01)
    weight, dense = normal(11, 6), curvature.matrix() + curvature.damping * torch.eye(6)
    for j in range(6):
        others = [k for k in range(6) if k != j]
        change = torch.zeros(6).double()
        change[j] = -weight[j]
        change[others] = -torch.linalg.solve(dense[others][:, others], dense[others][:, j] * change[j])
        least = 0.5 * float(change @ dense @ change)
        assert 0.5 * float(weight[j]) ** 2 / curvature.inverse_entry(j, j) == pytest.approx(least)


def test_blocks_of_gradients_as_they_come() -> None:
    gradients = normal(12, 9, 3, 4)
    blocks = BlockAccumulator((3, 4), 5, torch.float64)
    for few in gradients.split(2):
        blocks.add(few)
    torch.testing.assert_close(blocks.curvature().matrices, BlockRankOneSum.from_gradients(gradients, 5).matrices)


# Refusals


def test_gradients_must_be_there_and_finite() -> None:
    for empty in (torch.empty(0, 3), torch.ones(3)):
        with pytest.raises(DataError, match="m of 1 or more"):
            RankOneSum.from_gradients(empty)
        with pytest.raises(DataError, match="m of 1 or more"):
            BlockRankOneSum.from_gradients(empty, 2)
    broken = normal(0, 4, 3)
    broken[2, 1] = float("nan")
    with pytest.raises(DataError, match="gradient 2 holds NaN"):
        RankOneSum.from_gradients(broken)
    with pytest.raises(DataError, match="NaN"):
        BlockRankOneSum.from_gradients(broken, 2)
    with pytest.raises(DataError, match=r"must be \(m, 3\)"):
        BlockAccumulator((3,), 2).add(torch.ones(2, 4))
    with pytest.raises(DataError, match="no gradient was added"):
        BlockAccumulator((3,), 2).curvature()
    with pytest.raises(OptionError, match="block size is 0"):
        BlockRankOneSum.from_gradients(normal(0, 4, 3), 0)
    with pytest.raises(OptionError, match="from_gradients"):
        RankOneSum(gradients=normal(0, 4, 3), inner_products=torch.eye(3).double())


def test_an_undamped_sum_has_no_inverse() -> None:
    with pytest.raises(ConditioningError, match="4 gradients in 3 dimensions"):
        RankOneSum.from_gradients(normal(0, 4, 3)).solve(torch.ones(3))


def test_a_window_refuses_what_does_not_fit() -> None:
    window = GradientWindow(3, (4,))
    with pytest.raises(DataError, match="no gradient yet"):
        window.curvature()
    with pytest.raises(OptionError, match="does not fit"):
        window.push(torch.ones(5))
    window.push(torch.ones(4))
    with pytest.raises(DataError, match="NaN"):
        window.push(torch.full((4,), float("nan")))
    torch.testing.assert_close(window.curvature().matvec(torch.ones(4)), torch.full((4,), 4.0))
    with pytest.raises(OptionError, match="use 1 or more"):
        GradientWindow(0, (4,))
