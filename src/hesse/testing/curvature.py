"""Tests that any curvature inherits: every product and law against a dense matrix."""

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hesse.errors import OptionError, UnsupportedProduct
from hesse.estimation.storage import load_curvature, save_curvature
from hesse.testing.dense import DenseReference
from hesse.testing.numbers import BATCHES, laws, precisions, seeds


class CurvatureLaws(DenseReference):
    """Every product of a curvature against the matrix that it stands for, and the laws that hold for all.

    A subclass supplies `build` and `dense`, and `weight` where the curvature acts on the last dimensions of a larger
    weight; it inherits tests of matvec, solve, `@`, inverse, power, quadratic, diagonal, inverse diagonal, trace, rank,
    scipy, damping, batching, precision and saving. Products that are not in `offers` must be refused with
    UnsupportedProduct.

        class TestMine(CurvatureLaws):
            def build(self, dtype): return Mine(values=VALUES.to(dtype))
            def dense(self): return VALUES.diag()
    """

    positive = True  # semi-definite; an exact Hessian need not be

    # Products

    @precisions
    @pytest.mark.parametrize("batch", BATCHES, ids=str)
    def test_matvec(self, dtype: torch.dtype, batch: tuple[int, ...]) -> None:
        vectors = self._vectors(1, *batch)
        self._check_product(self.build(dtype).matvec, vectors, self.dense(), dtype)

    @precisions
    @pytest.mark.parametrize("batch", BATCHES, ids=str)
    def test_solve(self, dtype: torch.dtype, batch: tuple[int, ...]) -> None:
        self._needs("solve")
        vectors = self._vectors(2, *batch)
        self._check_product(self._damped(dtype).solve, vectors, self._inverse(), dtype)

    @precisions
    def test_solve_without_damping(self, dtype: torch.dtype) -> None:
        self._needs("solve")
        self._check_undamped(self.build(dtype).solve, dtype)

    @precisions
    @pytest.mark.parametrize("exponent", [-1.0, -0.5, 0.0, 0.5, 2.0])
    def test_power(self, dtype: torch.dtype, exponent: float) -> None:
        self._needs("power")
        vectors = self._vectors(9, 2)
        values, columns = torch.linalg.eigh(self.dense() + self._damping() * torch.eye(len(self.dense())).double())
        power = partial(self._damped(dtype).power, exponent=exponent)
        self._check_product(power, vectors, (columns * values**exponent) @ columns.T, dtype)

    def test_negative_powers_without_damping(self) -> None:
        self._needs("power")
        curvature = self.build(torch.float64)
        self._check_undamped(lambda vector: curvature.power(curvature.power(vector, -0.5), -0.5), torch.float64)

    def test_the_inverse_is_an_operator(self) -> None:
        self._needs("solve")
        curvature, vectors = self._damped(torch.float64), self._vectors(10, 2)
        inverse = curvature.inverse()
        assert (inverse.shape, inverse.dtype, inverse.device) == (curvature.shape, curvature.dtype, curvature.device)
        assert torch.equal(inverse @ vectors, curvature.solve(vectors))
        assert torch.equal(inverse.matvec(vectors), curvature.solve(vectors))
        expected = 0.5 * torch.einsum("bi,ij,bj->", self._flat(vectors), self._inverse(), self._flat(vectors))
        assert inverse.quadratic(vectors) == pytest.approx(float(expected), rel=1e-6)
        if "inverse_diagonal" in self.offers:
            assert torch.equal(inverse.diagonal(), curvature.inverse_diagonal())

    def test_the_matrix_product_sign_is_matvec(self) -> None:
        curvature, vectors = self.build(torch.float64), self._vectors(11, 2)
        assert torch.equal(curvature @ vectors, curvature.matvec(vectors))

    def test_as_an_operator_of_scipy(self) -> None:
        curvature, vectors = self._damped(torch.float64), self._flat(self._vectors(12, 3))
        operator = curvature.to_scipy(self.weight())
        assert operator.shape == tuple(self.dense().shape)
        product = torch.from_numpy(operator @ vectors.T.numpy()).T  # three columns at once, and then one
        self._check(product, vectors @ self.dense(), torch.float64)
        self._check(torch.from_numpy(operator.T @ vectors[0].numpy()), vectors[0] @ self.dense(), torch.float64)
        if "solve" in self.offers:
            solved = torch.from_numpy(curvature.inverse().to_scipy(self.weight()) @ vectors[0].numpy())
            self._check(solved, vectors[0] @ self._inverse(), torch.float64)
        if len(curvature.shape):
            with pytest.raises(OptionError, match="do not end in the operator's shape"):
                curvature.to_scipy((*self.weight()[:-1], self.weight()[-1] + 1))

    @precisions
    def test_quadratic_sums_over_leading_dimensions(self, dtype: torch.dtype) -> None:
        changes = self._vectors(4, 5)
        expected = 0.5 * torch.einsum("bi,ij,bj->", self._flat(changes), self.dense(), self._flat(changes))
        quadratic = self.build(dtype).quadratic(changes.to(dtype))
        assert quadratic == pytest.approx(float(expected), rel=self.precise_to[dtype])

    @precisions
    def test_diagonal(self, dtype: torch.dtype) -> None:
        self._needs("diagonal")
        curvature = self.build(dtype)
        assert curvature.diagonal().shape == curvature.shape
        self._check(curvature.diagonal().expand(self.weight()).flatten(), self.dense().diagonal(), dtype)

    @precisions
    def test_inverse_diagonal(self, dtype: torch.dtype) -> None:
        self._needs("inverse_diagonal")
        curvature = self._damped(dtype)
        assert curvature.inverse_diagonal().shape == curvature.shape
        self._check(curvature.inverse_diagonal().expand(self.weight()).flatten(), self._inverse().diagonal(), dtype)

    @precisions
    def test_trace(self, dtype: torch.dtype) -> None:
        self._needs("trace")
        trace = self.build(dtype).trace() * self._repeats()
        assert trace == pytest.approx(float(self.dense().trace()), rel=self.precise_to[dtype])

    @precisions
    def test_rank(self, dtype: torch.dtype) -> None:
        self._needs("rank")
        assert self.build(dtype).rank() * self._repeats() == int(torch.linalg.matrix_rank(self.dense()))

    def test_matrix(self) -> None:
        curvature = self.build(torch.float64)
        size = curvature.shape.numel()
        assert curvature.matrix().shape == (size, size)
        self._check(curvature.matrix(), self.dense()[:size, :size], curvature.dtype)

    # Damping

    def test_damping_says_its_reference(self) -> None:
        self._needs("trace")
        self._needs("rank")
        values = torch.linalg.eigvalsh(self.dense())
        positive = values[values > 1e-10 * values.max()]
        curvature = self.build(torch.float64)
        assert curvature.damped(0.1).damping == pytest.approx(0.1 * float(values.mean()), rel=1e-6)
        assert curvature.damped(0.1, of="range").damping == pytest.approx(0.1 * float(positive.mean()), rel=1e-6)

    def test_only_inverses_see_the_damping(self) -> None:
        plain, damped, vector = self.build(torch.float64), self._damped(torch.float64), self._vectors(5)
        assert damped.damping == self._damping()
        assert torch.equal(plain.matvec(vector), damped.matvec(vector))
        assert damped.with_damping(0.0).damping == 0

    @pytest.mark.parametrize("amount", [-0.01, float("nan"), float("inf")])
    def test_damping_must_be_a_finite_share(self, amount: float) -> None:
        with pytest.raises(OptionError, match="damping is"):
            self.build(torch.float64).damped(amount)
        with pytest.raises(OptionError, match="damping is"):
            self.build(torch.float64).with_damping(amount)

    # Laws

    @laws
    @given(seed=seeds)
    def test_law_symmetric(self, seed: int) -> None:
        curvature, left, right = self.build(torch.float64), self._vectors(seed), self._vectors(seed + 1)
        forth, back = (left * curvature.matvec(right)).sum(), (right * curvature.matvec(left)).sum()
        size = float(left.norm() * curvature.matvec(right).norm())
        assert abs(float(forth - back)) <= 1e-9 * size

    @laws
    @given(seed=seeds, factor=st.floats(-10, 10))
    def test_law_linear(self, seed: int, factor: float) -> None:
        curvature, left, right = self.build(torch.float64), self._vectors(seed), self._vectors(seed + 1)
        expected = curvature.matvec(left) + factor * curvature.matvec(right)
        error = (curvature.matvec(left + factor * right) - expected).norm()
        assert float(error) <= 1e-9 * (1 + abs(factor)) * float(left.norm() + right.norm()) * float(self.dense().norm())

    @laws
    @given(seed=seeds, size=st.floats(0, 1e3))
    def test_law_quadratic_is_half_the_inner_product(self, seed: int, size: float) -> None:
        curvature, change = self.build(torch.float64), size * self._vectors(seed)
        quadratic = curvature.quadratic(change)
        expected = 0.5 * float((change * curvature.matvec(change)).sum())
        assert quadratic == pytest.approx(expected, rel=1e-12, abs=1e-12)
        assert quadratic >= 0 or not self.positive

    @laws
    @given(seed=seeds)
    def test_law_solve_inverts_the_damped_product(self, seed: int) -> None:
        self._needs("solve")
        curvature, vector = self._damped(torch.float64), self._vectors(seed)
        there_and_back = curvature.solve(curvature.matvec(vector) + curvature.damping * vector)
        torch.testing.assert_close(there_and_back, vector, rtol=1e-8, atol=1e-8)

    @laws
    @given(seed=seeds)
    def test_law_leading_dimensions_are_independent(self, seed: int) -> None:
        curvature, vectors = self._damped(torch.float64), self._vectors(seed, 3)
        for product in (curvature.matvec, curvature.solve) if "solve" in self.offers else (curvature.matvec,):
            torch.testing.assert_close(product(vectors), torch.stack([product(vector) for vector in vectors]))

    # Files, devices and refusals

    @precisions
    def test_saved_and_loaded(self, dtype: torch.dtype, tmp_path: Path) -> None:
        if "save" not in self.offers:
            with pytest.raises(UnsupportedProduct, match="cannot be saved"):
                save_curvature(self.build(dtype), tmp_path / "curvature.safetensors")
            assert not any(tmp_path.iterdir())
            return
        curvature, vector = self._damped(dtype), self._vectors(6).to(dtype)
        save_curvature(curvature, tmp_path / "curvature.safetensors")
        loaded = load_curvature(tmp_path / "curvature.safetensors")
        assert type(loaded) is type(curvature)
        assert loaded.damping == curvature.damping
        for field in fields(curvature):
            before, after = getattr(curvature, field.name), getattr(loaded, field.name)
            assert not isinstance(before, Tensor) or (before.dtype == after.dtype and torch.equal(before, after))
        # Not to the bit: a tensor that was transposed in memory is not any more.
        torch.testing.assert_close(loaded.matvec(vector), curvature.matvec(vector))

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_on_a_cuda_device(self, tmp_path: Path) -> None:
        self._needs("save")
        save_curvature(self._damped(torch.float64), tmp_path / "curvature.safetensors")
        there, vector = load_curvature(tmp_path / "curvature.safetensors", "cuda"), self._vectors(7)
        self._check(there.matvec(vector.cuda()).cpu(), self.build(torch.float64).matvec(vector), torch.float64)
        if "solve" in self.offers:
            self._check(there.solve(vector.cuda()).cpu(), self._damped(torch.float64).solve(vector), torch.float64)

    def test_tensors_of_another_shape_type_or_place_are_refused(self) -> None:
        curvature = self._damped(torch.float64)
        if not len(curvature.shape):
            pytest.skip("acts on tensors of every shape")
        products: list[Callable[[Tensor], Tensor]] = [curvature.matvec]
        if "solve" in self.offers:
            products += [curvature.solve, curvature.inverse().matvec]
        if "power" in self.offers:
            products += [lambda vector: curvature.power(vector, 0.5)]
        for product in products:
            with pytest.raises(OptionError, match="was given a tensor"):
                product(torch.zeros(*self.weight()[:-1], self.weight()[-1] + 1, dtype=torch.float64))
            with pytest.raises(OptionError, match="floating-point"):
                product(torch.zeros(self.weight(), dtype=torch.long))
            with pytest.raises(OptionError, match="on meta: move one"):
                product(torch.zeros(self.weight(), dtype=torch.float64, device="meta"))

    def test_products_that_are_not_offered_are_refused_by_name(self) -> None:
        damped = self._damped(torch.float64)
        vector = self._vectors(8)
        products: dict[str, Callable[[], object]] = {
            "solve": lambda: damped.solve(vector),
            "power": lambda: damped.power(vector, 0.5),
            "inverse_diagonal": damped.inverse_diagonal,
            "diagonal": damped.diagonal,
            "trace": damped.trace,
            "rank": damped.rank,
        }
        for name, product in products.items():
            if name not in self.offers:
                with pytest.raises(UnsupportedProduct):
                    product()
        if "solve" not in self.offers:
            with pytest.raises(UnsupportedProduct):
                damped.inverse() @ vector
