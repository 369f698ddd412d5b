"""Kronecker factors whose eigenvalues were measured again (EK-FAC)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import Self

from hesse.curvature.base import Curvature
from hesse.curvature.kronecker import Kronecker
from hesse.errors import ConditioningError, DataError, OptionError


@dataclass(frozen=True, kw_only=True, eq=False)
class EigenKronecker(Curvature):
    """H V = Q_G (Λ ⊙ (Q_Gᵀ V Q_A)) Q_Aᵀ on a weight (out, in): the eigenvectors of G and A, any eigenvalues Λ.

    With Λ = E[(Q_Gᵀ g Q_A)²] over the weight's gradients g it is the nearest such matrix to E[g gᵀ] in the Frobenius
    norm, so never further from it than G ⊗ A. Unit as of the gradients: nats for each thing that a gradient is of.
    Source: George et al., 2018.
    """

    output_vectors: Tensor  # Q_G (out, out), eigenvectors as columns
    input_vectors: Tensor  # Q_A (in, in)
    eigenvalues: Tensor  # Λ (out, in)
    per: Literal["position", "sample"]  # what the gradients were of

    @classmethod
    def from_gradients(
        cls, kronecker: Kronecker, gradients: Tensor, per: Literal["position", "sample"] = "position"
    ) -> Self:
        """The eigenvectors of `kronecker`, with eigenvalues from `gradients` (m, out, in), one a position or a sample.

        Raises:
            OptionError: the factors are of the other reduction: positions' eigenvalues differ from samples' by orders.
            DataError: there is no gradient, or one is not finite.
        """
        if gradients.ndim != 3 or not len(gradients):
            raise DataError(f"gradients must be (m, out, in) with m of 1 or more, not {tuple(gradients.shape)}")
        if per != kronecker.per:
            raise OptionError(f"factors per {kronecker.per} take eigenvalues per {kronecker.per}, not per {per}")
        left, right = kronecker.eigenvectors()
        rotated = left.T.to(gradients) @ gradients @ right.to(gradients)
        eigenvalues = rotated.square().mean(0)
        if not bool(torch.isfinite(eigenvalues).all()):
            raise DataError("the gradients hold NaN or infinity")
        return cls(
            output_vectors=left.to(gradients), input_vectors=right.to(gradients), eigenvalues=eigenvalues, per=per
        )

    @property
    def shape(self) -> torch.Size:
        return self.eigenvalues.shape

    @property
    def _held(self) -> Tensor:
        return self.eigenvalues

    def _through(self, vector: Tensor, values: Tensor) -> Tensor:
        left, right = self.output_vectors, self.input_vectors
        rotated = left.T @ vector.to(left.dtype) @ right
        return (left @ (rotated * values) @ right.T).to(vector.dtype)

    def matvec(self, vector: Tensor) -> Tensor:
        return self._through(vector, self.eigenvalues)

    @property
    def _inverse(self) -> Tensor:
        damped = self.eigenvalues + self.damping
        limit = damped.max() * torch.finfo(damped.dtype).eps
        if not bool((damped > (limit if self.damping == 0 else 0)).all()):
            raise ConditioningError("this EigenKronecker curvature is singular without damping; use .damped(0.01)")
        return 1 / damped

    def solve(self, vector: Tensor) -> Tensor:
        return self._through(vector, self._inverse)

    def _spread(self, values: Tensor) -> Tensor:
        return self.output_vectors.square() @ values @ self.input_vectors.square().T

    def diagonal(self) -> Tensor:
        return self._spread(self.eigenvalues)

    def inverse_diagonal(self) -> Tensor:
        return self._spread(self._inverse)

    def rank(self) -> int:
        limit = self.eigenvalues.max() * torch.finfo(self.eigenvalues.dtype).eps * max(self.shape)
        return int((self.eigenvalues > limit).sum())

    def trace(self) -> float:
        return float(self.eigenvalues.double().sum())

    def largest_eigenvalue(self) -> float:
        return float(self.eigenvalues.max())
