"""A symmetric linear operator on tensors of one shape: H itself, and its inverse."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hesse.errors import OptionError


class Operator(ABC):
    """A symmetric operator on tensors whose trailing dimensions are `shape`; leading dimensions are independent.

    A subclass supplies `_matvec`; the public `matvec` first refuses tensors of another shape, type or device.
    """

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """Trailing dimensions of the tensors that the operator acts on."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The precision that the operator is held in."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The device that the operator is held on."""

    @abstractmethod
    def _matvec(self, vector: Tensor) -> Tensor:
        """Return the product with `vector` (..., *shape), which has been checked."""

    def matvec(self, vector: Tensor) -> Tensor:
        """Return the product with `vector` (..., *shape), in its shape.

        Raises:
            OptionError: the tensor has another shape or device, or no floating-point type.
        """
        self._check(vector)
        return self._matvec(vector)

    def __matmul__(self, vector: Tensor) -> Tensor:
        """Return `matvec(vector)`."""
        return self.matvec(vector)

    def quadratic(self, change: Tensor) -> float:
        """Return ½ dᵀHd of this operator H, summed over leading dimensions of `change` d (..., *shape)."""
        return 0.5 * float((change.double() * self.matvec(change).double()).sum())

    def to_scipy(self, shape: Sequence[int] | None = None) -> Any:
        """Return a `scipy.sparse.linalg.LinearOperator` (n, n) on the row-major entries of tensors of a shape.

        By default that is the operator's own `shape`. A larger one, such as a whole weight's (out, in) for a Gram on
        (in,), repeats the operator over the leading dimensions.

        Raises:
            OptionError: `shape` does not end in the operator's own.
        """
        from scipy.sparse.linalg import LinearOperator  # imported here, since it takes long and few need it

        whole = self.shape if shape is None else torch.Size(shape)
        if whole[len(whole) - len(self.shape) :] != self.shape:
            raise OptionError(f"tensors {tuple(whole)} do not end in the operator's shape {tuple(self.shape)}")
        precision = torch.promote_types(self.dtype, torch.float32)

        def products(columns: NDArray[Any]) -> NDArray[Any]:
            rows = np.ascontiguousarray(columns.reshape(whole.numel(), -1).T)
            vectors = torch.from_numpy(rows).to(self.device, precision).view(-1, *whole)
            images: NDArray[Any] = self.matvec(vectors).reshape(len(rows), -1).T.cpu().numpy()
            return images.reshape(columns.shape)

        kind = np.float64 if precision == torch.float64 else np.float32
        size = whole.numel()
        return LinearOperator((size, size), matvec=products, rmatvec=products, matmat=products, dtype=kind)

    def _check(self, vector: Tensor) -> None:
        """Refuse a tensor that the operator does not act on."""
        name, shape, inner = type(self).__name__, tuple(self.shape), len(self.shape)
        if not vector.is_floating_point():
            raise OptionError(f"a {name} acts on floating-point tensors, not on {vector.dtype}")
        if tuple(vector.shape[vector.ndim - inner :]) != shape or vector.ndim < inner:
            expected = ", ".join(("...", *map(str, shape)))
            raise OptionError(f"a {name} on ({expected}) was given a tensor {tuple(vector.shape)}")
        if inner and vector.device != self.device:
            raise OptionError(f"a {name} on {self.device} was given a tensor on {vector.device}: move one")
