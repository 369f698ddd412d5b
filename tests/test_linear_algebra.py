"""Solves, eigenvalues and sampled estimates from products alone, against dense linear algebra."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hesse.curvature import Curvature, Diagonal, Gram, Kronecker, RankOneSum
from hesse.errors import DataError, OptionError, UnsupportedProduct
from hesse.finite import all_finite
from hesse.solvers import (
    conjugate_gradients,
    hutch_plus_plus,
    hutchinson_diagonal,
    hutchinson_trace,
    lanczos,
    linear_solve,
    log_determinant,
    spectral_density,
)
from hesse.solvers.linear.conjugate_gradients import conjugate_steps
from hesse.solvers.linear.triangular import inverse_of
from hesse.testing import normal, seeds

N = 12


@dataclass(frozen=True, kw_only=True, eq=False)
class Matrix(Curvature):
    """A symmetric matrix with its product and nothing else."""

    values: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.values.shape[:1]

    def _matvec(self, vector: Tensor) -> Tensor:
        return vector @ self.values.to(vector.dtype)

    def diagonal(self) -> Tensor:
        return self.values.diagonal()


def with_eigenvalues(seed: int, values: Tensor) -> Matrix:
    vectors = torch.linalg.qr(normal(seed, len(values), len(values))).Q
    return Matrix(values=vectors @ values.double().diag() @ vectors.T)


def positive(seed: int = 0) -> Matrix:
    return with_eigenvalues(seed, torch.linspace(0.1, 5, N))


INDEFINITE = torch.linspace(-1, 5, N)


@pytest.mark.parametrize("size", [1, 7, 128, 129, 400])
def test_inverse_of_a_triangle(size: int) -> None:
    lower = torch.linalg.cholesky(with_eigenvalues(size, torch.linspace(0.1, 5, size)).values)
    inverse = inverse_of(lower)
    torch.testing.assert_close(inverse @ lower, torch.eye(size).double())
    assert bool((inverse.triu(1) == 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_numbers_that_are_none_are_found(dtype: torch.dtype) -> None:
    tensor = normal(0, 3, 5).to(dtype)
    assert all_finite(tensor)
    assert all_finite(tensor[:0])
    for value in (math.nan, math.inf, -math.inf):
        damaged = tensor.clone()
        damaged[1, 2] = value
        assert not all_finite(damaged)


# Conjugate gradients


@settings(max_examples=25, deadline=None)
@given(seed=seeds, batch=st.sampled_from([(), (1,), (2, 3)]), damping=st.sampled_from([0.0, 0.1, 10.0]))
def test_conjugate_gradients_solve(seed: int, batch: tuple[int, ...], damping: float) -> None:
    curvature, vector = positive(seed).with_damping(damping), normal(seed + 1, *batch, N)
    solved = conjugate_gradients(curvature, vector, tolerance=1e-10)
    dense = curvature.values + damping * torch.eye(N)
    torch.testing.assert_close(
        solved.solution, torch.linalg.solve(dense, vector.reshape(-1, N).T).T.reshape(vector.shape)
    )
    assert solved.converged
    assert solved.relative_residual < 1e-9
    assert 0 < solved.iterations <= N + 3
    assert "converged" in solved.sentence


def test_on_weights_of_any_shape() -> None:
    left, right, vector = normal(0, 9, 3), normal(1, 9, 4), normal(2, 2, 3, 4)
    curvature = Kronecker(output_factor=left.T @ left / 9, input_factor=right.T @ right / 9).damped(0.1)
    torch.testing.assert_close(
        conjugate_gradients(curvature, vector, tolerance=1e-10).solution, curvature.solve(vector), rtol=1e-6, atol=1e-8
    )


def test_a_start_and_a_preconditioner_save_iterations() -> None:
    scales = torch.logspace(-3, 3, N).double()
    curvature = Matrix(values=scales.sqrt()[:, None] * positive().values * scales.sqrt())
    vector = normal(1, N)
    plain = conjugate_gradients(curvature, vector)
    preconditioned = conjugate_gradients(curvature, vector, preconditioner=Diagonal(values=curvature.diagonal()))
    assert preconditioned.converged
    assert preconditioned.iterations < plain.iterations
    again = conjugate_gradients(curvature, vector, start=preconditioned.solution, tolerance=1e-5)
    assert again.iterations <= 1
    torch.testing.assert_close(again.solution, torch.linalg.solve(curvature.values, vector), rtol=1e-4, atol=1e-4)


def test_too_few_iterations_are_said() -> None:
    solved = conjugate_gradients(positive(), normal(1, N), max_iterations=2, tolerance=1e-10)
    assert (solved.ending, solved.iterations, solved.converged) == ("iterations", 2, False)
    assert solved.relative_residual > 1e-3
    assert "did not converge in 2 iterations" in solved.sentence


def test_negative_curvature_is_met_and_shown() -> None:
    curvature = with_eigenvalues(0, INDEFINITE)
    solved = conjugate_gradients(curvature, normal(1, N))
    assert solved.ending == "negative curvature"
    assert solved.negative_curvature is not None
    along = float(solved.negative_curvature @ curvature.values @ solved.negative_curvature)
    assert along < 0
    assert solved.curvature_along == pytest.approx(along)
    assert float(solved.negative_curvature.norm()) == pytest.approx(1)
    assert "negative curvature" in solved.sentence
    assert conjugate_gradients(curvature.with_damping(1.1), normal(1, N)).converged


def test_one_bad_problem_leaves_the_others_alone() -> None:
    curvature = Matrix(values=torch.diag(torch.tensor([-1.0, 1.0, 2.0, 3.0])).double())
    vectors = torch.tensor([[1.0, 0, 0, 0], [0, 1, 1, 1]]).double()
    solved = conjugate_gradients(curvature, vectors)
    torch.testing.assert_close(solved.solution[1], torch.tensor([0, 1, 1 / 2, 1 / 3]).double())
    assert solved.ending == "negative curvature"


def test_nothing_to_solve() -> None:
    solved = conjugate_gradients(positive(), torch.zeros(N).double())
    assert solved.converged
    assert solved.iterations == 0
    assert not solved.solution.any()


def test_solving_says_which_way_it_went() -> None:
    gram, vector = Gram.from_inputs(normal(0, 30, 4)).damped(0.1), normal(1, 3, 4)
    direct = linear_solve(gram, vector)
    assert direct.method == "direct"
    assert direct.relative_residual < 1e-10
    assert "Solved directly" in direct.sentence
    torch.testing.assert_close(direct.solution, gram.solve(vector))
    iterated = linear_solve(positive(), normal(1, N), tolerance=1e-9)
    assert iterated.method == "conjugate gradients"
    torch.testing.assert_close(iterated.solution, torch.linalg.solve(positive().values, normal(1, N)))


def test_products_that_are_not_finite_are_named() -> None:
    with pytest.raises(DataError, match="NaN or infinity"):
        conjugate_gradients(Matrix(values=torch.full((3, 3), float("nan"))), torch.ones(3))


@pytest.mark.parametrize("steps", [N, 10 * N])
def test_steps_come_to_the_minimum_and_stay_there(steps: int) -> None:
    matrix, wanted, start = positive(), normal(1, N), normal(2, N)
    residual = matrix.matvec(wanted - start)
    found = conjugate_steps(start, residual, matrix.diagonal(), matrix.matvec, steps)
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)


def test_steps_end_where_nothing_bends() -> None:
    start = normal(0, N)
    assert torch.equal(conjugate_steps(start, torch.ones(N), torch.ones(N), torch.zeros_like, 5), start)


# Eigenvalues


@pytest.mark.parametrize("which", ["largest", "smallest"])
@settings(max_examples=15, deadline=None)
@given(seed=seeds, k=st.integers(1, 4))
def test_lanczos_finds_the_extreme_eigenpairs(which: str, seed: int, k: int) -> None:
    curvature = with_eigenvalues(seed, INDEFINITE)
    found = lanczos(curvature, k, which=which, tolerance=1e-9, seed=seed)  # type: ignore[arg-type]
    expected = INDEFINITE.double().sort(descending=which == "largest").values[:k]
    torch.testing.assert_close(found.values, expected)
    images = found.vectors @ curvature.values
    torch.testing.assert_close(images, found.values[:, None] * found.vectors, atol=1e-7, rtol=0)
    torch.testing.assert_close(found.vectors @ found.vectors.T, torch.eye(k).double(), atol=1e-7, rtol=0)
    assert found.converged
    assert "converged" in found.sentence


def test_lanczos_finds_both_ends() -> None:
    curvature = with_eigenvalues(0, INDEFINITE)
    ends = lanczos(curvature, 2, which="both", tolerance=1e-9)
    expected = INDEFINITE.double()[[-1, -2, 0, 1]]
    torch.testing.assert_close(ends.values, expected)
    assert ends.converged
    few = lanczos(RankOneSum.from_gradients(normal(7, 1, 5)), 2, which="both")
    assert len(few.values) == len(few.vectors) == 2  # a rank of one has but two different eigenvalues


def test_lanczos_says_when_it_has_not_converged() -> None:
    values = torch.linspace(0, 1, 200)
    found = lanczos(with_eigenvalues(0, values), 3, max_products=8, tolerance=1e-8)
    assert not found.converged
    assert found.products == 8
    assert "did not converge in 8 products" in found.sentence
    # Each value is within its residual of a true one.
    for value, residual in zip(found.values, found.residuals, strict=True):
        assert float((values.double() - value).abs().min()) <= float(residual)


def test_lanczos_stops_where_nothing_is_left() -> None:
    curvature = RankOneSum.from_gradients(normal(0, 3, 50))
    found = lanczos(curvature, 5)
    expected = torch.linalg.eigvalsh(curvature.inner_products).flip(0) / 3
    torch.testing.assert_close(found.values[:3], expected)
    assert found.products <= 6
    assert found.converged


def test_lanczos_on_weights() -> None:
    left, right = normal(0, 9, 3), normal(1, 9, 4)
    curvature = Kronecker(output_factor=left.T @ left, input_factor=right.T @ right)
    found = lanczos(curvature, 2, tolerance=1e-10)
    assert found.vectors.shape == (2, 3, 4)
    torch.testing.assert_close(curvature.matvec(found.vectors[0]), found.values[0] * found.vectors[0])


def test_the_density_is_that_of_the_eigenvalues() -> None:
    values = torch.cat([torch.linspace(0, 1, 150), torch.linspace(4, 5, 50)])
    spectrum = spectral_density(with_eigenvalues(0, values), probes=20, steps=60)
    points = torch.linspace(-1, 6, 50)
    distance = (points[:, None] - values) / 0.3
    expected = (torch.exp(-0.5 * distance.square()) / (0.3 * (2 * torch.pi) ** 0.5)).sum(1)
    density = spectrum.density(points, 0.3)
    assert density.samples == 20
    assert float((density.value - expected).abs().max()) < 0.1 * float(expected.max())
    share = spectrum.share_below(2.0)
    assert abs(float(share.value) - 0.75) < 4 * float(share.standard_error)


# Estimates


def test_estimates_are_unbiased_and_know_their_error() -> None:
    curvature = with_eigenvalues(0, torch.logspace(-2, 2, 60))
    trace = float(curvature.values.trace())
    for estimate in (
        hutchinson_trace(curvature, 200),
        hutch_plus_plus(curvature, 60),
        log_determinant(curvature.with_damping(0.5), 50),
    ):
        assert float(estimate.standard_error) > 0
        assert "±" in str(estimate)
    assert abs(float(hutchinson_trace(curvature, 200).value) - trace) < 4 * float(
        hutchinson_trace(curvature, 200).standard_error
    )
    determinant = float(torch.logdet(curvature.values + 0.5 * torch.eye(60)))
    estimate = log_determinant(curvature.with_damping(0.5), 50)
    assert abs(float(estimate.value) - determinant) < 4 * float(estimate.standard_error)
    diagonal = hutchinson_diagonal(curvature, 400)
    errors = (diagonal.value - curvature.diagonal()) / diagonal.standard_error
    assert float(errors.square().mean()) == pytest.approx(1, abs=0.6)  # one, up to its own spread


def test_standard_errors_are_those_of_repetition() -> None:
    curvature = with_eigenvalues(0, torch.logspace(-2, 2, 60))
    runs = torch.stack([hutchinson_trace(curvature, 16, seed).value for seed in range(200)])
    claimed = torch.stack([hutchinson_trace(curvature, 16, seed).standard_error for seed in range(200)])
    assert float(runs.std()) == pytest.approx(float(claimed.mean()), rel=0.2)


def test_hutch_plus_plus_beats_hutchinson_where_few_eigenvalues_hold_the_trace() -> None:
    curvature = with_eigenvalues(0, 1 / torch.arange(1, 101).double() ** 2)
    trace = float(curvature.values.trace())
    plain = torch.stack([hutchinson_trace(curvature, 30, seed).value for seed in range(30)])
    better = torch.stack([hutch_plus_plus(curvature, 30, seed).value for seed in range(30)])
    assert float((better - trace).square().mean()) < 0.05 * float((plain - trace).square().mean())


def test_the_trace_of_few_dimensions_is_exact() -> None:
    curvature = positive()
    estimate = hutch_plus_plus(curvature, 3 * N)
    assert float(estimate.value) == pytest.approx(float(curvature.values.trace()))
    assert float(hutchinson_trace(Diagonal(values=torch.ones(5)), 3).value) == pytest.approx(5)
    assert hutchinson_trace(Diagonal(values=torch.ones(5)), 1).standard_error == float("inf")


# Refusals


def test_numbers_without_a_meaning_are_refused() -> None:
    curvature = positive()
    for wrong, message in (
        (lambda: conjugate_gradients(curvature, torch.ones(N), tolerance=0), "tolerance is 0"),
        (lambda: conjugate_gradients(curvature, torch.ones(N), max_iterations=0), "0 iterations"),
        (lambda: lanczos(curvature, 0), "0 eigenvalues"),
        (lambda: lanczos(curvature, N + 1), f"{N + 1} eigenvalues"),
        (lambda: lanczos(curvature, 3, max_products=2), "3 products or more"),
        (lambda: hutchinson_trace(curvature, 0), "0 random vectors"),
        (lambda: hutch_plus_plus(curvature, 2), "3 or more"),
        (lambda: spectral_density(curvature, steps=0), "0 steps"),
        (lambda: log_determinant(with_eigenvalues(0, INDEFINITE)), "not positive definite"),
    ):
        with pytest.raises(OptionError, match=message):
            wrong()


def test_other_errors_of_a_solve_are_not_hidden() -> None:
    with pytest.raises(UnsupportedProduct):
        positive().solve(torch.ones(N))
