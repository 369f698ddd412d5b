"""Kronecker factors whose eigenvalues were measured again (EK-FAC)."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from typing_extensions import Self

from hesse.curvature.base import Curvature
from hesse.curvature.kronecker import Kronecker, spread, through_eigenvectors
from hesse.curvature.origin import Origin
from hesse.errors import ConditioningError, DataError, OptionError
from hesse.finite import all_finite


@dataclass(frozen=True, kw_only=True, eq=False)
class EigenKronecker(Curvature):
    """H V = R (Λ ⊙ (Rᵀ V C)) Cᵀ on a weight (rows, columns): a Kronecker's eigenvectors, any eigenvalues Λ.

    For a linear layer's weight (out, in) R holds the eigenvectors of G and C those of A. With Λ = E[(Rᵀ g C)²] over
    the weight's gradients g it is the nearest such matrix to E[g gᵀ] in the Frobenius norm, so never further from it
    than G ⊗ A. Unit as of the gradients: see `origin`. Source: George et al., 2018.

    Example:
        >>> H = EigenKronecker(row_vectors=None, column_vectors=None, eigenvalues=torch.tensor([[1.0, 2.0]]))
        >>> H @ torch.ones(1, 2)
        tensor([[1., 2.]])
    """

    row_vectors: Tensor | None  # R (rows, rows), eigenvectors as columns; None is the identity
    column_vectors: Tensor | None  # C (columns, columns)
    eigenvalues: Tensor  # Λ (rows, columns)

    @classmethod
    def from_gradients(cls, kronecker: Kronecker, gradients: Tensor, origin: Origin | None = None) -> Self:
        """Return the eigenvectors of `kronecker` with eigenvalues from `gradients` (m, rows, columns) of an `origin`.

        Raises:
            OptionError: the factors have another origin; eigenvalues per position and per sample differ by orders of
                magnitude.
            DataError: there is no gradient, or one is not finite.
        """
        if gradients.ndim != 3 or not len(gradients):
            raise DataError(f"gradients must be (m, rows, columns) with m of 1 or more, not {tuple(gradients.shape)}")
        if None not in (origin, kronecker.origin) and origin != kronecker.origin:
            raise OptionError(f"factors of a {kronecker.origin} cannot take eigenvalues of a {origin}")
        rows, columns = (None if v is None else v.to(gradients) for _, v in kronecker.eigen)
        rotated = gradients if columns is None else gradients @ columns
        eigenvalues = (rotated if rows is None else rows.T @ rotated).square().mean(0)
        if not all_finite(eigenvalues):
            raise DataError("the gradients hold NaN or infinity")
        stated = kronecker.origin if origin is None else origin
        return cls(row_vectors=rows, column_vectors=columns, eigenvalues=eigenvalues, origin=stated)

    @property
    def shape(self) -> torch.Size:
        return self.eigenvalues.shape

    @property
    def _held(self) -> Tensor:
        return self.eigenvalues

    def _through(self, vector: Tensor, values: Tensor) -> Tensor:
        return through_eigenvectors(vector.to(self.dtype), values, self.row_vectors, self.column_vectors).to(vector)

    def _matvec(self, vector: Tensor) -> Tensor:
        return self._through(vector, self.eigenvalues)

    @cached_property
    def _inverse(self) -> Tensor:
        damped = self.eigenvalues + self.damping
        limit = damped.max() * torch.finfo(damped.dtype).eps
        if not bool((damped > (limit if self.damping == 0 else 0)).all()):
            raise ConditioningError("this EigenKronecker curvature is singular without damping; use .damped(0.01)")
        return 1 / damped

    def _solve(self, vector: Tensor) -> Tensor:
        return self._through(vector, self._inverse)

    def _power(self, vector: Tensor, exponent: float) -> Tensor:
        damped = 1 / self._inverse if exponent < 0 else self.eigenvalues + self.damping
        return self._through(vector, damped**exponent)

    def diagonal(self) -> Tensor:
        return spread(self.eigenvalues, self.row_vectors, self.column_vectors)

    def inverse_diagonal(self) -> Tensor:
        return spread(self._inverse, self.row_vectors, self.column_vectors)

    def rank(self) -> int:
        limit = self.eigenvalues.max() * torch.finfo(self.eigenvalues.dtype).eps * max(self.shape)
        return int((self.eigenvalues > limit).sum())

    def trace(self) -> float:
        return float(self.eigenvalues.double().sum())

    def largest_eigenvalue(self) -> float:
        return float(self.eigenvalues.max())
