"""H = G ⊗ A: the curvature of the loss itself at one linear layer (K-FAC)."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from hesse.curvature.base import Curvature
from hesse.errors import ConditioningError, OptionError


@dataclass(frozen=True, kw_only=True, eq=False)
class Kronecker(Curvature):
    """Output factor G ⊗ input factor A on a weight (out, in): H V = G V A.

    With A = E[xxᵀ] per token and G the second moment per token of the gradient of the sequence's summed loss at the
    layer's output (labels sampled from the model: the true Fisher), `quadratic(d)` is in nats per token. G is
    (out, out), or (out,) when only its diagonal was kept. Positions are taken as independent (`per="position"`,
    K-FAC expand), or summed over a sample first (`per="sample"`, K-FAC reduce).
    Source: Martens and Grosse, 2015; shared weights: Eschenhagen et al., 2023. Damping is added to the product:
    G ⊗ A + λI, solved exactly in the factors' eigenbases.
    """

    output_factor: Tensor  # (out, out) or (out,)
    input_factor: Tensor  # (in, in)
    per: Literal["position", "sample"] = "position"  # what the factors are sums over

    def __post_init__(self) -> None:
        if self.output_factor.ndim not in (1, 2) or self.input_factor.ndim != 2:
            raise OptionError("Kronecker takes an output factor (out, out) or (out,) and an input factor (in, in)")

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.output_factor.shape[0], self.input_factor.shape[0]))

    @property
    def _held(self) -> Tensor:
        return self.input_factor

    def matvec(self, vector: Tensor) -> Tensor:
        right = vector @ self.input_factor.to(vector.dtype)
        left = self.output_factor.to(vector.dtype)
        return left[:, None] * right if left.ndim == 1 else left @ right

    def diagonal(self) -> Tensor:
        left = self.output_factor if self.output_factor.ndim == 1 else self.output_factor.diagonal()
        return left[:, None] * self.input_factor.diagonal()

    def eigenvectors(self) -> tuple[Tensor, Tensor]:
        """Eigenvectors of G (out, out) and of A (in, in), as columns, in float64."""
        inputs = torch.linalg.eigh(self.input_factor.double()).eigenvectors
        if self.output_factor.ndim == 1:
            return torch.eye(self.shape[0]).to(inputs), inputs
        return torch.linalg.eigh(self.output_factor.double()).eigenvectors, inputs

    @cached_property
    def _eigen(self) -> tuple[Tensor, Tensor, Tensor]:
        """Eigenvectors of G and of A, and the eigenvalues of G ⊗ A + λI as (out, in); in float64."""
        input_values, input_vectors = torch.linalg.eigh(self.input_factor.double())
        if self.output_factor.ndim == 1:
            output_values = self.output_factor.double()
            output_vectors = torch.eye(len(output_values)).to(output_values)
        else:
            output_values, output_vectors = torch.linalg.eigh(self.output_factor.double())
        values = output_values.clamp(min=0)[:, None] * input_values.clamp(min=0) + self.damping
        undetermined = self.damping == 0 and self.rank() < self.shape.numel()
        if undetermined or not bool((values > torch.finfo(torch.float32).tiny).all()):
            raise ConditioningError("this Kronecker curvature is singular and has no damping; use .damped(0.01) first")
        return output_vectors, input_vectors, values

    def solve(self, vector: Tensor) -> Tensor:
        left, right, values = self._eigen
        rotated = left.T @ vector.double() @ right / values
        return (left @ rotated @ right.T).to(vector.dtype)

    def inverse_diagonal(self) -> Tensor:
        left, right, values = self._eigen
        return (left.square() @ (1 / values) @ right.square().T).to(self.input_factor.dtype)

    def rank(self) -> int:
        input_rank = int(torch.linalg.matrix_rank(self.input_factor, hermitian=True))
        if self.output_factor.ndim == 1:
            return int(torch.count_nonzero(self.output_factor)) * input_rank
        return int(torch.linalg.matrix_rank(self.output_factor, hermitian=True)) * input_rank
