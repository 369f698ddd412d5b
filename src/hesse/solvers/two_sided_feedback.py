"""Error feedback over both sides of a Kronecker curvature, then coordinate descent with refitted scales."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hesse.constraints import Codebook, CodebookCode, Constraint, Grid, GridCode, SparseGrid
from hesse.curvature import Curvature, Kronecker
from hesse.errors import UnsupportedProduct
from hesse.solvers.admm import ADMM
from hesse.solvers.base import Solver, float32_bytes
from hesse.solvers.linear.triangular import backwards_in, inverse_of, kronecker_root, read_backwards
from hesse.solvers.two_sided_search import CodebookSearch, GridSearch, TwoSidedState, for_loops


@dataclass(frozen=True)
class TwoSidedFeedback(Solver):
    """Rounding of a weight (out, in) that makes each error good by all weights after it, in its column and beyond.

    With H = G ⊗ A, the Cholesky factor of H⁻¹ is the Kronecker product of those of G⁻¹ and A⁻¹, so that Optimal Brain
    Surgeon's update of all weights left costs no more than that of their own row: column by column, and within a
    column row by row. With a diagonal G it is GPTQ. Then `passes` times the scales are refitted to the codes by
    `refit_steps` of conjugate gradients, and each code is changed where that lowers ½ tr(G d A dᵀ); a last refit
    follows. Never worse than rounding to nearest on the same grid.

    With a Sparse besides, ADMM chooses what is dropped and the values to start from; the sweeps then hold the zeros. On
    a Codebook the values of each row are those of k-means weighted by H's diagonal, and are refitted like scales.

    Choose it where the end loss's curvature is known (a Kronecker of Fisher factors) and quality counts. Needs factors
    that are positive definite: `Kronecker.with_damped_factors`. On a GPU with Triton the loops over codes are kernels,
    else they run on the CPU. Source: the update of GPTQ (Frantar et al., 2022) on the curvature of K-FAC (Martens and
    Grosse, 2015).
    """

    passes: int = 1
    refit_steps: int = 3

    def init(self, curvature: Curvature) -> TwoSidedState:
        if not isinstance(curvature, Kronecker) or curvature.input_factor.ndim != 2 or curvature.transposed:
            raise UnsupportedProduct(
                f"TwoSidedFeedback needs a Kronecker with an input factor (in, in), not a {type(curvature).__name__}"
            )
        output = curvature.output_factor
        output = output if output.ndim == 2 else torch.diag(output)
        columns, rows = _falling(curvature.input_factor), _falling(output)
        return TwoSidedState(
            curvature,
            columns,
            rows,
            for_loops(curvature.input_factor[columns][:, columns]),
            for_loops(output[rows][:, rows]),
            _feedback(curvature.input_factor, columns),
            _feedback(output, rows),
        )

    def compute(self, state: TwoSidedState, weight: Tensor, constraint: Constraint) -> GridCode | CodebookCode:
        if isinstance(constraint, Codebook):
            plain = constraint.encode(weight, state.curvature.diagonal().to(weight.dtype))
            return CodebookSearch(state, constraint, weight).best_code(plain, weight, self.passes, self.refit_steps)
        if isinstance(constraint, SparseGrid):
            pruned = ADMM().compute(state.pruning, weight, constraint.sparse)
            grid, kept = constraint.grid, pruned.mask
            start = constraint.sparse.decode(pruned).to(weight.dtype)
        elif isinstance(constraint, Grid):
            grid, kept, start = constraint, None, weight
        else:
            raise UnsupportedProduct(
                f"TwoSidedFeedback solves Grid, Sparse & Grid and Codebook, not {type(constraint).__name__}"
            )
        rounded = grid.round(start, grid.fit(start))
        return GridSearch(state, grid, weight, kept).best_code(rounded, start, self.passes, self.refit_steps)

    def workspace(self, shape: torch.Size, curvature: type[Curvature], constraint: Constraint, held: int = 0) -> int:
        factoring = max(float32_bytes(shape, inputs=5, outputs=1), float32_bytes(shape, inputs=2, outputs=5))
        if isinstance(constraint, SparseGrid):
            return max(factoring, float32_bytes(shape, weights=18.5, inputs=3, outputs=3))
        weights = 11 if isinstance(constraint, Codebook) else 9
        return max(factoring, float32_bytes(shape, weights=weights, inputs=2, outputs=2))

    def settle(self, state: TwoSidedState, weight: Tensor, grid: Grid, code: GridCode) -> GridCode:
        """`code` after passes of coordinate descent until one does not lower the cost, scales as they are."""
        search = GridSearch(state, grid, weight)
        best, before = search.price(code), math.inf
        while best.cost < before:
            best, before = search.cheaper(best, search.descend(best)), best.cost
        settled: GridCode = best.code
        return settled


def _falling(factor: Tensor) -> Tensor:
    return torch.argsort(factor.diagonal(), descending=True, stable=True)


def _feedback(factor: Tensor, order: Tensor) -> Tensor:
    """U_j / U_jj of the upper triangular U with factor⁻¹ = UᵀU, in `order`."""
    rows, _ = read_backwards(inverse_of(kronecker_root(backwards_in(factor, order))))
    return for_loops(rows)
