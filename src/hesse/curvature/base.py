"""The protocol of a curvature: a symmetric operator H on tensors of a parameter's shape."""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import Self

from hesse.curvature.origin import Origin
from hesse.errors import ConditioningWarning, OptionError, UnsupportedProduct


@dataclass(frozen=True, kw_only=True, eq=False)
class Curvature(ABC):
    """A symmetric positive semi-definite approximation H of the second derivative of a loss, plus λI.

    H acts on tensors whose trailing dimensions are `shape`; any leading dimensions are independent right-hand
    sides; other tensors are refused. `damping` is the absolute λ; only `solve` and `inverse_diagonal` see it. Units:
    `quadratic` is in the unit of the loss that H was estimated from; estimators note it, with the reduction, in
    `origin`.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for product in ("matvec", "solve", "row_quadratics"):
            if product in cls.__dict__:
                setattr(cls, product, _checked(cls.__dict__[product]))

    undamped: ClassVar[tuple[str, ...]] = ()  # cached properties that the damping does not change

    damping: float = 0.0
    origin: Origin | None = None  # None where tensors of no stated meaning were given

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """Trailing dimensions of the tensors that H acts on."""

    @property
    def dtype(self) -> torch.dtype:
        """The precision that H is held in."""
        return self._held.dtype

    @property
    def device(self) -> torch.device:
        """Where H is held."""
        return self._held.device

    @property
    def _held(self) -> Tensor:
        """A tensor with the precision and the place of H; override it where the diagonal is not at hand."""
        return self.diagonal()

    @abstractmethod
    def matvec(self, vector: Tensor) -> Tensor:
        """H v, of the shape of `vector` (..., *shape); without damping."""

    @abstractmethod
    def diagonal(self) -> Tensor:
        """diag(H), of shape `shape`; without damping."""

    def solve(self, vector: Tensor) -> Tensor:
        """(H + λI)⁻¹ v, of the shape of `vector` (..., *shape)."""
        raise UnsupportedProduct(f"{type(self).__name__} has no inverse product; use Gram or Kronecker")

    def inverse_diagonal(self) -> Tensor:
        """diag((H + λI)⁻¹), of shape `shape`."""
        raise UnsupportedProduct(f"{type(self).__name__} has no inverse diagonal; use Gram or Kronecker")

    def rank(self) -> int:
        """Rank of H to working precision."""
        return int(torch.count_nonzero(self.diagonal()))

    def quadratic(self, change: Tensor) -> float:
        """½ dᵀHd, summed over leading dimensions of `change` (..., *shape)."""
        return 0.5 * float((change.double() * self.matvec(change).double()).sum())

    def trace(self) -> float:
        """Sum of the diagonal of H."""
        return float(self.diagonal().double().sum())

    def largest_eigenvalue(self) -> float:
        """The largest eigenvalue of H, or a lower bound of it: by default the largest entry of its diagonal."""
        return float(self.diagonal().amax())

    def matrix(self) -> Tensor:
        """H as a matrix over the row-major entries of `shape`, (n, n): for small curvatures and tests."""
        size = self.shape.numel()
        columns = self.matvec(torch.eye(size, dtype=self.dtype, device=self.device).view(size, *self.shape))
        return columns.reshape(size, size).T

    def damped(self, amount: float, of: Literal["space", "range"] = "space") -> Self:
        """The same curvature with λ = `amount` times a mean eigenvalue of H.

        `of="space"` takes trace / dimension (the custom of GPTQ and SparseGPT), `of="range"` trace / rank. The two
        differ by dimension / rank, which is large when there are fewer samples than dimensions.
        """
        if not (math.isfinite(amount) and amount >= 0):
            raise OptionError(f"damping is {amount}, but must be a finite number that is not negative; try 0.01")
        size = self.shape.numel() if of == "space" else max(self.rank(), 1)
        return self.with_damping(amount * self.trace() / size)

    def with_damping(self, damping: float) -> Self:
        """The same curvature with λ = `damping`, in the units of H."""
        if not (math.isfinite(damping) and damping >= 0):
            raise OptionError(f"damping is {damping}, but must be a finite number that is not negative")
        try:
            lost = torch.finfo(self.dtype).eps * self.largest_eigenvalue()
        except UnsupportedProduct:
            lost = 0.0
        if 0 < damping < lost:
            warnings.warn(
                f"damping {damping:.2g} of this {type(self).__name__} is below the rounding of its largest eigenvalue, "
                f"{lost:.2g}: rounding may drown it; use more, or float64",
                ConditioningWarning,
                stacklevel=2,
            )
        other = replace(self, damping=damping)
        other.__dict__.update({name: self.__dict__[name] for name in self.undamped if name in self.__dict__})
        return other


Product = Callable[[Any, Tensor], Tensor]


def _checked(product: Product) -> Product:
    """`product`, refusing tensors that H does not act on."""

    @wraps(product)
    def checked(self: Curvature, vector: Tensor) -> Tensor:
        shape, inner = tuple(self.shape), len(self.shape)
        if not vector.is_floating_point():
            raise OptionError(f"a {type(self).__name__} acts on floating-point tensors, not on {vector.dtype}")
        if tuple(vector.shape[vector.ndim - inner :]) != shape or vector.ndim < inner:
            wanted = ", ".join(("...", *map(str, shape)))
            raise OptionError(f"a {type(self).__name__} on ({wanted}) was given a tensor {tuple(vector.shape)}")
        if inner and vector.device != self.device:
            raise OptionError(
                f"a {type(self).__name__} on {self.device} was given a tensor on {vector.device}: move one"
            )
        return product(self, vector)

    return checked
