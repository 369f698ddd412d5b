"""The protocol of a curvature: a symmetric operator H on tensors of a parameter's shape, and its inverse."""

import math
import warnings
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import Self

from hesse.curvature.operator import Operator
from hesse.curvature.origin import Origin
from hesse.errors import ConditioningWarning, OptionError, UnsupportedProduct


@dataclass(frozen=True, kw_only=True, eq=False)
class Curvature(Operator):
    """A symmetric positive semi-definite approximation H of the second derivative of a loss, plus λI.

    H acts on tensors whose trailing dimensions are `shape`; any leading dimensions are independent right-hand
    sides; other tensors are refused. `damping` is the absolute λ; only `solve`, `inverse`, `inverse_diagonal` and
    `power` see it. Units: `quadratic` is in the unit of the loss that H was estimated from; estimators note it, with
    the reduction, in `origin`.

    A subclass supplies `shape`, `_matvec` and `diagonal`, and overrides the products that it can do cheaply: `_solve`
    and `_power` behind `solve` and `power`, `inverse_diagonal`, `rank`, `trace`. What it lacks it refuses by name.
    """

    undamped: ClassVar[tuple[str, ...]] = ()  # cached properties that the damping does not change

    damping: float = 0.0
    origin: Origin | None = None  # None where tensors of no stated meaning were given

    @property
    def dtype(self) -> torch.dtype:
        return self._held.dtype

    @property
    def device(self) -> torch.device:
        return self._held.device

    @property
    def _held(self) -> Tensor:
        """A tensor with the precision and device of H; override it where the diagonal is not at hand."""
        return self.diagonal()

    @abstractmethod
    def _matvec(self, vector: Tensor) -> Tensor:
        """Return H v of a checked `vector` (..., *shape), in its shape; without damping."""

    @abstractmethod
    def diagonal(self) -> Tensor:
        """Return diag(H), of shape `shape`; without damping."""

    def solve(self, vector: Tensor) -> Tensor:
        """Return (H + λI)⁻¹ v, of the shape of `vector` (..., *shape).

        Raises:
            UnsupportedProduct: the curvature has no inverse product.
            ConditioningError: H + λI is singular.
        """
        self._check(vector)
        return self._solve(vector)

    def _solve(self, vector: Tensor) -> Tensor:
        raise UnsupportedProduct(f"{type(self).__name__} has no inverse product; use Gram or Kronecker")

    def inverse(self) -> "Inverse":
        """Return (H + λI)⁻¹ as an operator: `H.inverse() @ v` is `H.solve(v)`."""
        return Inverse(self)

    def power(self, vector: Tensor, exponent: float) -> Tensor:
        """Return (H + λI)^p v, of the shape of `vector` (..., *shape), for any real `exponent` p.

        Raises:
            UnsupportedProduct: the curvature has no cheap eigenvectors.
            ConditioningError: H + λI is singular and the exponent negative.
        """
        self._check(vector)
        return self._power(vector, exponent)

    def _power(self, vector: Tensor, exponent: float) -> Tensor:
        raise UnsupportedProduct(
            f"{type(self).__name__} has no cheap powers; use Diagonal, Gram, Kronecker or EigenKronecker"
        )

    def inverse_diagonal(self) -> Tensor:
        """Return diag((H + λI)⁻¹), of shape `shape`."""
        raise UnsupportedProduct(f"{type(self).__name__} has no inverse diagonal; use Gram or Kronecker")

    def rank(self) -> int:
        """Return the rank of H to working precision."""
        return int(torch.count_nonzero(self.diagonal()))

    def trace(self) -> float:
        """Return the sum of the diagonal of H."""
        return float(self.diagonal().double().sum())

    def largest_eigenvalue(self) -> float:
        """Return the largest eigenvalue of H, or a lower bound of it: by default the largest diagonal entry."""
        return float(self.diagonal().amax())

    def matrix(self) -> Tensor:
        """Return H as a matrix over the row-major entries of `shape`, (n, n): for small curvatures and tests."""
        size = self.shape.numel()
        columns = self.matvec(torch.eye(size, dtype=self.dtype, device=self.device).view(size, *self.shape))
        return columns.reshape(size, size).T

    def damped(self, amount: float, of: Literal["space", "range"] = "space") -> Self:
        """Return the same curvature with λ = `amount` times a mean eigenvalue of H.

        `of="space"` takes trace / dimension (the custom of GPTQ and SparseGPT), `of="range"` trace / rank. The two
        differ by dimension / rank, which is large when there are fewer samples than dimensions.
        """
        if not (math.isfinite(amount) and amount >= 0):
            raise OptionError(f"damping is {amount}, but must be a finite number that is not negative; try 0.01")
        size = self.shape.numel() if of == "space" else max(self.rank(), 1)
        return self.with_damping(amount * self.trace() / size)

    def with_damping(self, damping: float) -> Self:
        """Return the same curvature with λ = `damping`, in the units of H."""
        if not (math.isfinite(damping) and damping >= 0):
            raise OptionError(f"damping is {damping}, but must be a finite number that is not negative")
        try:
            rounding = torch.finfo(self.dtype).eps * self.largest_eigenvalue()
        except UnsupportedProduct:
            rounding = 0.0
        if 0 < damping < rounding:
            warnings.warn(
                f"damping {damping:.2g} of this {type(self).__name__} is below the rounding of its largest eigenvalue, "
                f"{rounding:.2g}, which may exceed it: use more, or float64",
                ConditioningWarning,
                stacklevel=2,
            )
        other = replace(self, damping=damping)
        other.__dict__.update({name: self.__dict__[name] for name in self.undamped if name in self.__dict__})
        return other


@dataclass(frozen=True, eq=False)
class Inverse(Operator):
    """(H + λI)⁻¹ of a curvature, which keeps the factors that its first product makes.

    `quadratic` of a gradient g is ½ gᵀ(H + λI)⁻¹g, the gain of a Newton step.

    Example:
        >>> H = Gram.from_inputs(torch.eye(2)).with_damping(0.5)  # E[xxᵀ] = I / 2
        >>> H.inverse() @ torch.tensor([1.0, 2.0])
        tensor([1., 2.])
    """

    curvature: Curvature

    @property
    def shape(self) -> torch.Size:
        return self.curvature.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.curvature.dtype

    @property
    def device(self) -> torch.device:
        return self.curvature.device

    def _matvec(self, vector: Tensor) -> Tensor:
        return self.curvature._solve(vector)

    def diagonal(self) -> Tensor:
        """Return diag((H + λI)⁻¹), of shape `shape`."""
        return self.curvature.inverse_diagonal()
