"""H = I ⊗ E[xxᵀ]: the squared error of a linear layer's output (OBS, GPTQ, SparseGPT)."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from typing_extensions import Self

from hesse.curvature.base import Curvature
from hesse.curvature.diagonal import Diagonal
from hesse.curvature.symmetric import row_products
from hesse.errors import ConditioningError, DataError
from hesse.finite import all_finite


@dataclass(frozen=True, kw_only=True, eq=False)
class Gram(Curvature):
    """The second moment A = E[xxᵀ] of a linear layer's inputs, the same for each row of its weight (out, in).

    `quadratic(d)` = ½ tr(d A dᵀ) = ½ E‖d x‖², half the squared change of the layer's output per token. That is the
    Hessian of the layer-wise loss ½‖Wx - W₀x‖² exactly; it knows nothing of how the output is used later.
    Source: Optimal Brain Surgeon (Hassibi and Stork, 1993), per layer: Optimal Brain Compression (Frantar and
    Alistarh, 2022).
    """

    second_moment: Tensor  # (in, in)
    tokens: int
    cross_moment: Tensor | None = None  # (in, in), E[x x₀ᵀ] with the inputs x₀ of the unchanged network

    @classmethod
    def from_inputs(cls, inputs: Tensor, reference: Tensor | None = None) -> Self:
        """The Gram of `inputs` (..., tokens, in), accumulated in float32 at least.

        With `reference`, the same tokens' inputs in another stream (the dense network's, where `inputs` are a
        compressed one's), it holds their cross moment too.

        Raises:
            DataError: there are no tokens, the streams differ in shape, or an input is not finite.
        """
        flat = inputs.reshape(-1, inputs.shape[-1])
        if flat.shape[0] == 0:
            raise DataError("a Gram needs at least one token of inputs")
        if reference is not None and reference.shape != inputs.shape:
            raise DataError(f"inputs {tuple(inputs.shape)} and reference {tuple(reference.shape)} differ in shape")
        flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
        second_moment = flat.T @ flat / flat.shape[0]
        cross = None if reference is None else flat.T @ reference.reshape(flat.shape).to(flat) / flat.shape[0]
        if not all(all_finite(moment) for moment in (second_moment, cross) if moment is not None):
            raise DataError("the inputs hold NaN or infinity")
        return cls(second_moment=second_moment, tokens=flat.shape[0], cross_moment=cross)

    @property
    def shape(self) -> torch.Size:
        return self.second_moment.shape[:1]

    @cached_property
    def factor(self) -> Tensor:
        """Lower Cholesky factor L of A + λI (in, in).

        Raises:
            ConditioningError: A + λI is not positive definite to working precision.
        """
        damped = self.second_moment.clone()
        damped.diagonal().add_(self.damping)
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(damped)
        # A leading minor that passes by rounding alone leaves a pivot near nothing and an inverse of noise.
        pivots = factor.diagonal()
        limit = torch.finfo(factor.dtype).eps * self.shape[0] * damped.diagonal().amax()
        if int(failed) or not bool((pivots.square() > limit).all()):
            raise self.singular()
        if self.damping == 0 and not self.resolves(torch.cholesky_inverse(factor).diagonal()):
            raise self.singular()
        return factor

    def resolves(self, inverse_diagonal: Tensor) -> bool:
        """Whether an inverse with the diagonal `inverse_diagonal` (in,) is more than the rounding noise of A.

        A_jj [A⁻¹]_jj is 1 / (1 - R²) of input j on the others, whatever the inputs' scales; noise in a direction that
        no token has takes it to nearly 1 / (in · eps) or above. With damping such a direction is λ, known exactly.
        """
        if self.damping > 0:
            return True
        noise = 2 * torch.finfo(self.second_moment.dtype).eps * self.shape[0]
        return bool((inverse_diagonal * self.diagonal() * noise < 1).all())

    def singular(self) -> ConditioningError:
        """The error to raise where A + λI cannot be inverted."""
        return ConditioningError(
            f"the Gram of {self.tokens} tokens in {self.shape[0]} dimensions is singular at damping "
            f"{self.damping:.3g}: use more damping (.damped(0.01)) or more tokens"
        )

    def matvec(self, vector: Tensor) -> Tensor:
        return vector @ self.second_moment.to(vector.dtype)

    def row_quadratics(self, change: Tensor) -> Tensor:
        """½ d A dᵀ of each row d of `change` (..., in), as (...,): at little more than half of what `matvec` takes."""
        return 0.5 * row_products(change, self.second_moment.to(change.dtype))

    def quadratic(self, change: Tensor) -> float:
        return float(self.row_quadratics(change).double().sum())

    def solve(self, vector: Tensor) -> Tensor:
        flat = vector.reshape(-1, self.shape[0]).to(self.factor.dtype)
        return torch.cholesky_solve(flat.T, self.factor).T.reshape(vector.shape).to(vector.dtype)

    def diagonal(self) -> Tensor:
        return self.second_moment.diagonal()

    def inverse_diagonal(self) -> Tensor:
        return torch.cholesky_inverse(self.factor).diagonal()

    def rank(self) -> int:
        return int(torch.linalg.matrix_rank(self.second_moment, hermitian=True))

    def target(self, weight: Tensor) -> Tensor:
        """The weight (out, in) whose outputs on x are nearest to those of `weight` W₀ on the reference inputs x₀.

        The minimum over W of E‖Wx - W₀x₀‖² + λ‖W - W₀‖² is W₀ (E[x₀xᵀ] + λI)(A + λI)⁻¹, and around it the loss is
        `quadratic`. Without a cross moment x₀ is x, and the answer `weight` itself.
        """
        if self.cross_moment is None:
            return weight
        wanted = weight @ self.cross_moment.T.to(weight.dtype) + self.damping * weight
        return self.solve(wanted)

    def diagonal_part(self) -> Diagonal:
        """Only E[x²] per input, which is what Wanda uses."""
        return Diagonal(values=self.diagonal(), damping=self.damping)
