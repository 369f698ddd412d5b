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
    """Round a weight (out, in) so that all later weights compensate for each error, in its row and in the others.

    Use it where the loss's curvature is known (a Kronecker of Fisher factors) and quality counts: it minimizes the loss
    itself instead of the error of the layer's output. It is the default of `hesse compress`.

    Equivalent to YAQA (Tseng et al., 2025, arXiv:2505.22988): the Cholesky factor of H⁻¹ for H = G ⊗ A is the Kronecker
    product of those of G⁻¹ and A⁻¹, so that Optimal Brain Surgeon's update of all remaining weights costs no more than
    that of one row: column by column, and within a column row by row. The plain loop is
    `hesse.solvers._reference.two_sided`; with a diagonal G it is GPTQ (Frantar et al., 2022). Fisher information at the
    outputs also guides rounding in GuidedQuant (Kim et al., 2025) and OAC (Edalati et al., 2024); the factors are those
    of K-FAC (Martens and Grosse, 2015). Ours on top: both sides are taken in falling order of their diagonal; symmetric
    scales may be negative (`Grid(signed=True)`); `passes` times the scales are refitted to the codes by `refit_steps`
    of conjugate gradients and each code is changed where that lowers ½ tr(G d A dᵀ), with a last refit; the result is
    never worse than rounding to nearest on the same grid; and other sets are solved under the same curvature. For a
    Sparse and a Grid together, ADMM chooses the zeros and the starting values, and the sweeps hold the zeros. The
    values of a Codebook are those of k-means weighted by H's diagonal, refitted like scales.

    The curvature must be a Kronecker (out, in) with an input factor (in, in) and positive definite factors:
    `Kronecker.with_damped_factors`. On a GPU with Triton the loops over codes of a Grid are kernels, otherwise they run
    on the CPU in float32.
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
        """Return `code` after coordinate descent until a pass no longer lowers the cost; scales stay as they are."""
        search = GridSearch(state, grid, weight)
        best, before = search.price(code), math.inf
        while best.cost < before:
            best, before = search.cheaper(best, search.descend(best)), best.cost
        settled: GridCode = best.code
        return settled


def _falling(factor: Tensor) -> Tensor:
    return torch.argsort(factor.diagonal(), descending=True, stable=True)


def _feedback(factor: Tensor, order: Tensor) -> Tensor:
    """Return U_j / U_jj of the upper triangular U with factor⁻¹ = UᵀU, in `order`."""
    rows, _ = read_backwards(inverse_of(kronecker_root(backwards_in(factor, order))))
    return for_loops(rows)
