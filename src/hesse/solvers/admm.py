"""Pruning by the alternating direction method of multipliers: mask and values of a whole layer together."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hesse.constraints import Constraint, Sparse, SparseCode
from hesse.curvature import Curvature, Gram, Kronecker
from hesse.curvature.kronecker import through_eigenvectors
from hesse.errors import UnsupportedProduct
from hesse.solvers.base import Solver, float32_bytes, require_constraint
from hesse.solvers.never_worse import refit_or_keep


@dataclass(frozen=True, eq=False)
class ADMMState:
    """A curvature H, and H' = H / (s sᵀ), whose diagonal is 1, by its eigenvalues and eigenvectors."""

    curvature: Curvature
    scale: Tensor  # s, (in,) or (out, in)
    values: Tensor  # (in,) or (out, in)
    rows: Tensor | None  # eigenvectors of G' as columns (out, out); None where rows are independent
    columns: Tensor  # of A' (in, in)

    def through(self, scaled: Tensor, values: Tensor) -> Tensor:
        """Return the product of `scaled` (out, in) with the matrix of these eigenvectors and eigenvalues `values`."""
        rows = None if self.rows is None else self.rows.to(scaled)
        return through_eigenvectors(scaled, values.to(scaled), rows, self.columns.to(scaled))


@dataclass(frozen=True)
class ADMM(Solver):
    """Choose mask and values of a whole layer together, by steps between the sparse set and the quadratic model.

    Use it for sparsity where quality counts: it considers all weights jointly; ErrorFeedback decides the first
    columns early. The eigenvectors of each side come first; then a step takes two products under a Gram, and four under
    a Kronecker.

    Equivalent to Boža, 2024 (arXiv:2401.02938) for a Gram and one ρ, and to ALPS (Meng et al., 2024, arXiv:2406.07831)
    with a rising ρ. In weights scaled by s: Z = the sparse part of W + U, U += W - Z, W = (H' + ρI)⁻¹ (H'W₀ + ρ(Z -
    U)). ρ rises from the first to the last of `strengths`, so that the mask moves freely at first and then settles. The
    mask is chosen anew, from |W + U|, until `settled_steps` before the end; then `refit_steps` of conjugate gradients
    take the kept values to their minimum. Rows under a Gram, and the whole under a Kronecker, are no worse than with
    the same mask and unchanged weights.

    The curvature must be a Gram, or a Kronecker (out, in) with an input factor (in, in); the constraint a Sparse.
    """

    steps: int = 40
    settled_steps: int = 5
    strengths: tuple[float, float] = (0.03, 3.0)
    refit_steps: int = 8

    def init(self, curvature: Curvature) -> ADMMState:
        if isinstance(curvature, Gram):
            scale, values, columns = _to_unit_diagonal(curvature.second_moment, curvature.damping)
            return ADMMState(curvature, scale, values, None, columns)
        if isinstance(curvature, Kronecker) and curvature.input_factor.ndim == 2 and not curvature.transposed:
            outputs = curvature.output_factor
            row_scale, row_values, rows = _to_unit_diagonal(outputs if outputs.ndim == 2 else torch.diag(outputs))
            scale, values, columns = _to_unit_diagonal(curvature.input_factor)
            return ADMMState(curvature, row_scale[:, None] * scale, row_values[:, None] * values, rows, columns)
        raise UnsupportedProduct(f"ADMM needs a Gram or a Kronecker (out, in), not a {type(curvature).__name__}")

    def compute(self, state: ADMMState, weight: Tensor, constraint: Constraint) -> SparseCode:
        constraint = require_constraint(self, constraint, Sparse)
        scale = state.scale.to(weight.dtype)
        found, dual = weight * scale, torch.zeros_like(weight)
        pulled, before = state.through(found, state.values), self.strengths[0]
        mask = constraint.mask(found.square())
        for step, strength in enumerate(self._rising()):
            dual *= before / strength  # in units of 1/ρ
            before = strength
            if step < self.steps - self.settled_steps:
                mask = constraint.mask((found + dual).square())
            sparse = (found + dual) * mask
            dual += found - sparse
            found = state.through(pulled + strength * (sparse - dual), 1 / (state.values + strength))
        start = found / scale * mask
        return refit_or_keep(state.curvature, constraint, weight, start, mask, self.refit_steps)

    def workspace(self, shape: torch.Size, curvature: type[Curvature], constraint: Constraint, held: int = 0) -> int:
        if issubclass(curvature, Kronecker):
            factoring = max(float32_bytes(shape, inputs=5, outputs=1), float32_bytes(shape, outputs=5))
            return max(factoring, float32_bytes(shape, weights=18.5, inputs=1, outputs=1))
        return max(float32_bytes(shape, inputs=5), float32_bytes(shape, weights=14.5, inputs=2))

    def _rising(self) -> list[float]:
        """Return ρ of each step."""
        first, last = self.strengths
        return [first * (last / first) ** (step / max(self.steps - 1, 1)) for step in range(self.steps)]


def _to_unit_diagonal(factor: Tensor, damping: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Return s (n,), eigenvalues and eigenvectors of M', M + λI = s sᵀ ⊙ M'; s is 1 where the diagonal is 0."""
    damped = factor.clone()
    damped.diagonal().add_(damping)
    scale = damped.diagonal().sqrt()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    values, vectors = torch.linalg.eigh(damped.div_(scale[:, None]).div_(scale))
    return scale, values.clamp(min=0), vectors
