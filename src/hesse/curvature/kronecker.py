"""H = G ⊗ A: the curvature of the loss itself at one layer (K-FAC), and with eigenvalues measured again (EK-FAC)."""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from typing_extensions import Self

from hesse.curvature.base import Curvature
from hesse.curvature.origin import Origin
from hesse.errors import ConditioningError, DataError, OptionError
from hesse.finite import all_finite

Eigen = tuple[Tensor, Tensor | None]  # eigenvalues (n,), and eigenvectors as columns (n, n) or None for the identity's


@dataclass(frozen=True, kw_only=True, eq=False)
class Kronecker(Curvature):
    """Output factor G and input factor A on a weight (out, in): H V = G V A; on a `transposed` one (in, out): A V G.

    With A = E[xxᵀ] and G the second moment of the gradient of a sample's summed loss at the layer's output, in a unit
    per token, `quadratic(d)` has that unit. Positions are taken as independent (`origin.per` is "position": K-FAC
    expand) or summed over a sample first ("sample": K-FAC reduce). A factor that is diagonal, such as an embedding's
    A, is held as its diagonal (n,). Damping is added to the product: G ⊗ A + λI, solved exactly in the factors'
    eigenbases.

    Source: K-FAC (Martens and Grosse, 2015); shared weights: Eschenhagen et al., 2023. As the curvature that weights
    are rounded under: YAQA (Tseng et al., 2025, arXiv:2505.22988); output-side Fisher information for rounding also in
    GuidedQuant (Kim et al., 2025) and OAC (Edalati et al., 2024).

    Example:
        >>> H = Kronecker(output_factor=torch.tensor([1.0, 2.0]), input_factor=torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
        >>> H @ torch.eye(2)
        tensor([[2., 1.],
                [2., 4.]])
        >>> H.quadratic(torch.eye(2))
        3.0
    """

    undamped = ("eigen",)

    output_factor: Tensor  # (out, out) or (out,)
    input_factor: Tensor  # (in, in) or (in,)
    transposed: bool = False  # True for a weight (in, out), as that of an embedding is

    def __post_init__(self) -> None:
        if self.output_factor.ndim not in (1, 2) or self.input_factor.ndim not in (1, 2):
            raise OptionError(
                "Kronecker takes an output factor (out, out) or (out,) and an input factor (in, in) or (in,)"
            )

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """The factors that act on the weight's rows and on its columns."""
        factors = (self.output_factor, self.input_factor)
        return (factors[1], factors[0]) if self.transposed else factors

    @property
    def shape(self) -> torch.Size:
        return torch.Size([len(factor) for factor in self.factors])

    @property
    def _held(self) -> Tensor:
        return self.input_factor

    def _matvec(self, vector: Tensor) -> Tensor:
        left, right = (factor.to(vector.dtype) for factor in self.factors)
        columns = vector * right if right.ndim == 1 else vector @ right
        return left[:, None] * columns if left.ndim == 1 else left @ columns

    def diagonal(self) -> Tensor:
        left, right = (factor if factor.ndim == 1 else factor.diagonal() for factor in self.factors)
        return left[:, None] * right

    def with_damped_factors(self, of_outputs: float, of_inputs: float) -> Self:
        """Return (G + γI) ⊗ (A + αI), γ and α being these shares of the mean eigenvalue of G and of A.

        Unlike `damped` it stays a Kronecker product, whose inverse's Cholesky factor is one too; `matvec` and
        `quadratic` see it. Source: the factored damping of Martens and Grosse, 2015.
        """
        if not all(math.isfinite(amount) and amount >= 0 for amount in (of_outputs, of_inputs)):
            raise OptionError(f"dampings are {of_outputs} and {of_inputs}, but must be finite and not negative")
        outputs, inputs = _add_ridge(self.output_factor, of_outputs), _add_ridge(self.input_factor, of_inputs)
        return replace(self, output_factor=outputs, input_factor=inputs)

    @cached_property
    def eigen(self) -> tuple[Eigen, Eigen]:
        """Eigenvalues and eigenvectors, in float64, of the factors on the weight's rows and on its columns."""
        return _eigen(self.factors[0]), _eigen(self.factors[1])

    @cached_property
    def _values(self) -> Tensor:
        """The eigenvalues of H + λI (rows, columns)."""
        (left, _), (right, _) = self.eigen
        values = left.clamp(min=0)[:, None] * right.clamp(min=0) + self.damping
        undetermined = self.damping == 0 and self.rank() < self.shape.numel()
        if undetermined or not bool((values > torch.finfo(torch.float32).tiny).all()):
            raise ConditioningError("this Kronecker curvature is singular and has no damping; use .damped(0.01) first")
        return values

    def _solve(self, vector: Tensor) -> Tensor:
        return through_eigenvectors(vector.double(), 1 / self._values, self.eigen[0][1], self.eigen[1][1]).to(
            vector.dtype
        )

    def _power(self, vector: Tensor, exponent: float) -> Tensor:
        (left, rows), (right, columns) = self.eigen
        damped = left.clamp(min=0)[:, None] * right.clamp(min=0) + self.damping
        values = (self._values if exponent < 0 else damped) ** exponent
        return through_eigenvectors(vector.double(), values, rows, columns).to(vector.dtype)

    def inverse_diagonal(self) -> Tensor:
        return spread(1 / self._values, self.eigen[0][1], self.eigen[1][1]).to(self.dtype)

    def rank(self) -> int:
        left, right = (_rank(factor) for factor in self.factors)
        return left * right

    def trace(self) -> float:
        left, right = (float((f if f.ndim == 1 else f.diagonal()).double().sum()) for f in self.factors)
        return left * right


def _add_ridge(factor: Tensor, amount: float) -> Tensor:
    """Return `factor` plus `amount` times its mean eigenvalue."""
    if factor.ndim == 1:
        return factor + amount * factor.mean()
    return factor + amount * factor.diagonal().mean() * torch.eye(len(factor)).to(factor)


def _eigen(factor: Tensor) -> Eigen:
    if factor.ndim == 1:
        return factor.double(), None
    values, vectors = torch.linalg.eigh(factor.double())
    return values, vectors


def _rank(factor: Tensor) -> int:
    if factor.ndim == 1:
        return int(torch.count_nonzero(factor))
    return int(torch.linalg.matrix_rank(factor, hermitian=True))


def through_eigenvectors(vector: Tensor, values: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """Return R (values ⊙ (Rᵀ V C)) Cᵀ for `vector` V (..., rows, columns); None is the identity."""
    rotated = vector if columns is None else vector @ columns
    rotated = (rotated if rows is None else rows.T @ rotated) * values
    rotated = rotated if columns is None else rotated @ columns.T
    return rotated if rows is None else rows @ rotated


def spread(values: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """Return the diagonal of the matrix of eigenvalues `values` (rows, columns) and these eigenvectors."""
    values = values if rows is None else rows.square() @ values
    return values if columns is None else values @ columns.square().T


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
