"""Vector codebooks: k-means that never rises, the sweep of VPTQ written out, refusals before any work."""

from collections.abc import Callable
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers import compress
from hesse.constraints import Grid, VectorCodebook
from hesse.constraints.weighted_means import nearest_vectors, weighted_means
from hesse.curvature import Diagonal, Gram, Identity
from hesse.errors import OptionError, UnsupportedProduct
from hesse.solvers import ErrorFeedback, Nearest, VectorFeedback, solve
from hesse.testing import normal, seeds


def gram(seed: int, width: int) -> Gram:
    inputs = normal(seed, 4 * width, width) * normal(seed + 1, width).exp() + normal(seed + 2, 4 * width, 1)
    return Gram.from_inputs(inputs).damped(0.01)


def cost(vectors: Tensor, masses: Tensor, centroids: Tensor) -> float:
    """Σ masses · (vector - centroid)², each vector at its best centroid."""
    distances = (masses[:, None] * (vectors[:, None] - centroids[None]).square()).sum(2)
    return float(distances.amin(1).sum())


@settings(max_examples=15, deadline=None)
@given(seed=seeds, count=st.integers(1, 9), weighted=st.booleans())
def test_no_step_of_k_means_raises_the_cost(seed: int, count: int, weighted: bool) -> None:
    vectors = normal(seed, 60, 3)
    masses = normal(seed + 1, 60, 3).square() if weighted else torch.ones(60, 3).double()
    masses[7] = 0
    costs = [cost(vectors, masses, weighted_means(vectors, masses, count, steps)) for steps in range(12)]
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(costs))
    found = weighted_means(vectors, masses, count, 100)
    assert torch.equal(found, weighted_means(vectors, masses, count, 101))  # it has come to an end
    nearest = nearest_vectors(vectors, found, masses)
    for number in nearest.unique().tolist():  # where each centroid is the mean of its own
        own = nearest == number
        mean = (masses[own] * vectors[own]).sum(0) / masses[own].sum(0)
        torch.testing.assert_close(found[number][masses[own].sum(0) > 0], mean[masses[own].sum(0) > 0])


def test_the_best_of_several_starts_is_the_best_of_all_partitions() -> None:
    vectors, masses = normal(1, 9, 2), normal(2, 9, 2).square()
    best = float("inf")
    for parts in product(range(2), repeat=9):
        total = 0.0
        for part in range(2):
            own = torch.tensor(parts) == part
            if bool(own.any()):
                mean = (masses[own] * vectors[own]).sum(0) / masses[own].sum(0)
                total += float((masses[own] * (vectors[own] - mean).square()).sum())
        best = min(best, total)
    found = [cost(vectors, masses, weighted_means(vectors, masses, 2, 50, seed)) for seed in range(8)]
    assert min(found) == pytest.approx(best)


def test_nearest_is_nearest_in_the_metric() -> None:
    vectors, centroids, masses = normal(3, 40, 4), normal(4, 6, 4), normal(5, 40, 4).square()
    for mass in (None, masses):
        inside = torch.ones_like(vectors) if mass is None else mass
        distances = (inside[:, None] * (vectors[:, None] - centroids[None]).square()).sum(2)
        assert torch.equal(nearest_vectors(vectors, centroids, mass), distances.argmin(1))


@pytest.mark.parametrize("books", [1, 2])
def test_the_stored_form(books: int) -> None:
    book, weight = VectorCodebook(2, 4, books, dtype=torch.bfloat16), normal(6, 16, 20)
    metric = normal(7, 20).square()
    code = book.encode(weight, metric)
    entries = 256 if books == 1 else 16
    assert code.codes.shape == (books, 4, 20)
    assert code.centroids.shape == (books, entries, 4)
    assert torch.equal(code.centroids, code.centroids.bfloat16().float())
    decoded = book.decode(code)
    for i, j in ((0, 0), (3, 19), (2, 7)):
        wanted = sum(code.centroids[b, int(code.codes[b, i, j])] for b in range(books))
        assert torch.equal(decoded[4 * i : 4 * i + 4, j], wanted.bfloat16().float())
    assert book.bits_per_weight(torch.Size([64, 64])) == 2 + books * entries * 4 * 16 / 4096
    again = solve(weight, Diagonal(values=metric.expand(16, 20)), VectorCodebook(1, 4, books), Nearest())
    first = VectorCodebook(1, 4, books).nearest(weight, metric)
    assert torch.equal(again.weight, first)  # the same each time


def test_few_different_vectors_are_exact() -> None:
    few = normal(8, 3, 4).float()
    weight = few[torch.randint(0, 3, (50,), generator=torch.Generator().manual_seed(0))].reshape(10, 20).T
    torch.testing.assert_close(VectorCodebook(1, 4).nearest(weight), weight)


@pytest.mark.parametrize("books", [1, 2])
@pytest.mark.parametrize("order", ["given", "descending"])
def test_the_sweep_is_optimal_brain_surgeon_from_column_to_column(books: int, order: str) -> None:
    book, curvature = VectorCodebook(2, 2, books, dtype=torch.float64), gram(9, 12)
    columns = list(range(12))
    if order == "descending":
        columns = torch.argsort(curvature.diagonal(), descending=True, stable=True).tolist()
    for seed in range(3):
        weight = normal(20 + seed, 8, 12)
        plain = book.encode(weight, curvature.diagonal())
        work, wanted = weight.clone(), torch.zeros_like(weight)
        inverse = torch.linalg.inv(curvature.second_moment + curvature.damping * torch.eye(12).double())
        for j in columns:
            for i in range(0, 8, 2):
                left = work[i : i + 2, j].clone()
                for centroids in plain.centroids:
                    entry = centroids[(centroids - left).square().sum(1).argmin()]
                    wanted[i : i + 2, j] += entry
                    left -= entry
            work -= torch.outer((work[:, j] - wanted[:, j]) / inverse[j, j], inverse[j])
            inverse = inverse - torch.outer(inverse[j], inverse[j]) / inverse[j, j]
            inverse[j] = inverse[:, j] = 0
        costs = [curvature.row_quadratics(member - weight).view(4, 2).sum(1) for member in (wanted, book.decode(plain))]
        cheaper = (costs[1] < costs[0]).repeat_interleave(2)[:, None]
        solver = VectorFeedback("descending" if order == "descending" else "given", block_size=5)
        found = solve(weight, curvature, book, solver)
        torch.testing.assert_close(found.weight, torch.where(cheaper, book.decode(plain), wanted))


def test_vectors_round_better_than_single_weights() -> None:
    """VPTQ's claim at 2 bits, with fewer bits in all than a grid with scales."""
    curvature = gram(11, 128)
    weight = normal(12, 256, 128).float()
    book, grid = VectorCodebook(2, 4, dtype=torch.bfloat16), Grid(2, 32, headroom=0.25, dtype=torch.bfloat16)
    assert book.bits_per_weight(weight.shape) <= grid.bits_per_weight(weight.shape)
    vectors = solve(weight, curvature, book, VectorFeedback("descending")).predicted_loss_increase
    assert vectors < 0.9 * solve(weight, curvature, grid, ErrorFeedback("descending")).predicted_loss_increase


def test_refusals(half_folder: Callable[[str], Path], tmp_path: Path) -> None:
    for options, message in (
        ({"method": "vptq", "bits": 3}, "a codebook of 4096 vectors of 4 is as large as a layer of"),
        ({"method": "vptq", "bits": 2, "vector_length": 5}, "vectors of 5 need a height divisible by 5"),
        ({"method": "squeezellm", "bits": 8}, "a codebook of 256 values is as large as a row of"),
    ):
        with pytest.raises(OptionError, match=message):
            compress(half_folder("llama"), tmp_path / "out", **options)
        assert not list(tmp_path.iterdir())  # before any work
    with pytest.raises(OptionError, match="give an index of 20 bits"):
        VectorCodebook(4, 5)
    with pytest.raises(OptionError, match=r"give an index of 2.5 bits"):
        VectorCodebook(1, 5, 2)
    with pytest.raises(OptionError, match="all are 1 at least"):
        VectorCodebook(0)
    with pytest.raises(UnsupportedProduct, match="VectorFeedback solves VectorCodebook, not Grid"):
        solve(normal(0, 4, 8), gram(0, 8), Grid(), VectorFeedback())
    with pytest.raises(UnsupportedProduct, match="VectorFeedback needs a Gram"):
        solve(normal(0, 4, 8), Identity(), VectorCodebook(1, 2), VectorFeedback())
