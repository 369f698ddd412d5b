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

    Example:
        >>> H = Gram.from_inputs(torch.tensor([[2.0, 0.0], [0.0, 4.0]]))
        >>> H @ torch.ones(3, 2)  # each row of a weight (3, 2) times E[xxᵀ]
        tensor([[2., 8.],
                [2., 8.],
                [2., 8.]])
        >>> H.inverse() @ torch.tensor([2.0, 8.0])
        tensor([1., 1.])
    """

    undamped = ("eigen",)

    second_moment: Tensor  # (in, in)
    tokens: int
    cross_moment: Tensor | None = None  # (in, in), E[x x₀ᵀ] with the inputs x₀ of the unchanged network

    @classmethod
    def from_inputs(cls, inputs: Tensor, reference: Tensor | None = None) -> Self:
        """Return the Gram of `inputs` (..., tokens, in), accumulated in float32 at least.

        `reference` are the same tokens' inputs in another network (the dense one, where `inputs` are those of a
        compressed one); with it, the Gram also holds their cross moment.

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
    def eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (in,) and eigenvectors as columns (in, in) of A in float64."""
        values, vectors = torch.linalg.eigh(self.second_moment.double())
        return values.clamp(min=0), vectors

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
        """Return True if an inverse with the diagonal `inverse_diagonal` (in,) is more than the rounding noise of A.

        A_jj [A⁻¹]_jj is 1 / (1 - R²) of input j on the others, whatever the inputs' scales; rounding noise in a
        direction without data raises it to about 1 / (in · eps) or above. With damping, A + λI is exactly λ there.
        """
        if self.damping > 0:
            return True
        noise = 2 * torch.finfo(self.second_moment.dtype).eps * self.shape[0]
        return bool((inverse_diagonal * self.diagonal() * noise < 1).all())

    def singular(self) -> ConditioningError:
        """Return the error to raise where A + λI cannot be inverted."""
        return ConditioningError(
            f"the Gram of {self.tokens} tokens in {self.shape[0]} dimensions is singular at damping "
            f"{self.damping:.3g}: use more damping (.damped(0.01)) or more tokens"
        )

    def _matvec(self, vector: Tensor) -> Tensor:
        return vector @ self.second_moment.to(vector.dtype)

    def row_quadratics(self, change: Tensor) -> Tensor:
        """Return ½ d A dᵀ of each row d of `change` (..., in), as (...,): a little more than half the work of `matvec`.

        Raises:
            OptionError: the tensor has another shape or device, or no floating-point type.
        """
        self._check(change)
        return 0.5 * row_products(change, self.second_moment.to(change.dtype))

    def quadratic(self, change: Tensor) -> float:
        return float(self.row_quadratics(change).double().sum())

    def _solve(self, vector: Tensor) -> Tensor:
        flat = vector.reshape(-1, self.shape[0]).to(self.factor.dtype)
        return torch.cholesky_solve(flat.T, self.factor).T.reshape(vector.shape).to(vector.dtype)

    def _power(self, vector: Tensor, exponent: float) -> Tensor:
        values, vectors = self.eigen
        damped = values + self.damping
        rounding = torch.finfo(self.dtype).eps * self.shape[0] * values.amax()
        if exponent < 0 and not bool((damped > (0 if self.damping else rounding)).all()):
            raise self.singular()
        return (((vector.double() @ vectors) * damped**exponent) @ vectors.T).to(vector.dtype)

    def diagonal(self) -> Tensor:
        return self.second_moment.diagonal()

    def inverse_diagonal(self) -> Tensor:
        return torch.cholesky_inverse(self.factor).diagonal()

    def rank(self) -> int:
        return int(torch.linalg.matrix_rank(self.second_moment, hermitian=True))

    def target(self, weight: Tensor) -> Tensor:
        """Return the weight (out, in) whose outputs on x are nearest to those of `weight` W₀ on reference inputs x₀.

        The minimum over W of E‖Wx - W₀x₀‖² + λ‖W - W₀‖² is W₀ (E[x₀xᵀ] + λI)(A + λI)⁻¹, and around it the loss is
        `quadratic`. Without a cross moment x₀ is x, and the result is `weight` itself.
        """
        if self.cross_moment is None:
            return weight
        return self.solve(weight @ self.cross_moment.T.to(weight.dtype) + self.damping * weight)

    def diagonal_part(self) -> Diagonal:
        """Return the Diagonal of E[x²] per input, which Wanda uses."""
        return Diagonal(values=self.diagonal(), damping=self.damping)
