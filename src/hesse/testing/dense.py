"""A curvature and the dense matrix that it stands for, and comparisons of the two."""

from abc import abstractmethod
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from hesse.curvature import Curvature
from hesse.errors import ConditioningError
from hesse.testing.numbers import TOLERANCE, normal


class DenseReference:
    """A curvature, its matrix, and the vectors on which laws compare the products of both."""

    offers: tuple[str, ...] = ("solve", "inverse_diagonal", "power", "diagonal", "trace", "rank", "save")
    precise_to: Mapping[torch.dtype, float] = TOLERANCE

    @abstractmethod
    def build(self, dtype: torch.dtype) -> Curvature:
        """The curvature, without damping."""

    @abstractmethod
    def dense(self) -> Tensor:
        """Its matrix over the row-major entries of `weight`, (n, n) float64."""

    def weight(self) -> tuple[int, ...]:
        """The shape of the weight that products are taken with."""
        return tuple(self.build(torch.float64).shape)

    def _vectors(self, seed: int, *batch: int) -> Tensor:
        return normal(seed, *batch, *self.weight())

    def _flat(self, tensor: Tensor) -> Tensor:
        inner = len(self.weight())
        return tensor.double().reshape(*tensor.shape[: tensor.ndim - inner], len(self.dense()))

    def _check(self, actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
        error = (actual.double() - expected).abs().max() / expected.abs().max()
        assert error <= self.precise_to[dtype], f"relative error {error:.2e}\n{actual}\n{expected}"

    def _check_product(
        self, product: Callable[[Tensor], Tensor], vectors: Tensor, dense: Tensor, dtype: torch.dtype
    ) -> None:
        actual = product(vectors.to(dtype))
        assert actual.shape == vectors.shape
        assert actual.dtype == dtype
        self._check(self._flat(actual), self._flat(vectors) @ dense, dtype)

    def _check_undamped(self, inverse: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
        """Assert that `inverse` solves with the matrix without damping, or refuses a singular one."""
        values, vector = torch.linalg.eigvalsh(self.dense()), self._vectors(3)
        if float(values.abs().min()) < 1e-10 * float(values.abs().max()):
            with pytest.raises(ConditioningError, match="damp"):
                inverse(vector.to(dtype))
            return
        expected = torch.linalg.solve(self.dense(), self._flat(vector))
        self._check(self._flat(inverse(vector.to(dtype))), expected, dtype)

    def _damping(self) -> float:
        return 0.3 * float(torch.linalg.eigvalsh(self.dense()).abs().max())

    def _damped(self, dtype: torch.dtype) -> Curvature:
        return self.build(dtype).with_damping(self._damping())

    def _inverse(self) -> Tensor:
        dense = self.dense()
        inverse: Tensor = torch.linalg.inv(dense + self._damping() * torch.eye(len(dense)).double())
        return inverse

    def _needs(self, product: str) -> None:
        if product not in self.offers:
            pytest.skip(f"{product} is not offered")

    def _repeats(self) -> int:
        return len(self.dense()) // self.build(torch.float64).shape.numel()
