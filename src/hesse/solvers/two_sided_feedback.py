"""Error feedback over both sides of a Kronecker curvature, then coordinate descent with refitted scales."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from hesse.constraints import Constraint, Grid, GridCode, Scales, SparseGrid
from hesse.constraints.base import round_to
from hesse.curvature import Curvature, Kronecker
from hesse.errors import UnsupportedProduct
from hesse.solvers import kernels, two_sided_loops
from hesse.solvers.admm import ADMM, ADMMState
from hesse.solvers.refit_scales import refit_scales
from hesse.solvers.triangular import backwards_in, inverse_of, kronecker_root, read_backwards
from hesse.solvers.two_sided_loops import Steps, TwoSidedSweeps


@dataclass(frozen=True, eq=False)
class TwoSidedState:
    """Both factors of a Kronecker, each in the order in which its side is taken, and what feeds errors back in it."""

    curvature: Kronecker
    columns: Tensor  # (in,) indices, the inputs with the largest curvature first
    rows: Tensor  # (out,) indices, likewise
    input_factor: Tensor  # A (in, in) in that order
    output_factor: Tensor  # G (out, out) in that order
    column_feedback: Tensor  # (in, in) unit upper triangular: the rows of the inverse's factor over its diagonal
    row_feedback: Tensor  # (out, out)

    @cached_property
    def pruning(self) -> ADMMState:
        """What chooses the weights that a Sparse drops."""
        return ADMM().init(self.curvature)


@dataclass(frozen=True)
class TwoSidedFeedback:
    """Rounding of a weight (out, in) that makes each error good by all weights after it, in its column and beyond.

    With H = G ⊗ A, the Cholesky factor of H⁻¹ is the Kronecker product of those of G⁻¹ and A⁻¹, so that Optimal Brain
    Surgeon's update of all weights left costs no more than that of their own row: column by column, and within a
    column row by row. With a diagonal G it is GPTQ. Then `passes` times the scales are refitted to the codes by
    `refit_steps` of conjugate gradients, and each code is changed where that lowers ½ tr(G d A dᵀ); a last refit
    follows. Never worse than rounding to nearest on the same grid.

    With a Sparse besides, ADMM chooses what is dropped and the values to start from; the sweeps then hold the zeros.

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
            _loop(curvature.input_factor[columns][:, columns]),
            _loop(output[rows][:, rows]),
            _feedback(curvature.input_factor, columns),
            _feedback(output, rows),
        )

    def compute(self, state: TwoSidedState, weight: Tensor, constraint: Constraint) -> GridCode:
        if isinstance(constraint, SparseGrid):
            pruned = ADMM().compute(state.pruning, weight, constraint.sparse)
            grid, kept = constraint.grid, pruned.mask
            start = constraint.sparse.decode(pruned).to(weight.dtype)
        elif isinstance(constraint, Grid):
            grid, kept, start = constraint, None, weight
        else:
            raise UnsupportedProduct(f"TwoSidedFeedback solves Grid and Sparse & Grid, not {type(constraint).__name__}")
        loops = _Loops(state, grid, weight, kept)
        scales = grid.fit(start)
        best = loops.cheaper(loops.priced(loops.fed_back(scales, start)), grid.round(start, scales))
        for _ in range(self.passes):
            best = loops.refitted(best, self.refit_steps)
            best = loops.cheaper(best, loops.descended(best))
        return loops.refitted(best, self.refit_steps).code

    def settled(self, state: TwoSidedState, weight: Tensor, grid: Grid, code: GridCode) -> GridCode:
        """`code` after passes of coordinate descent until one does not lower the cost, scales as they are."""
        loops = _Loops(state, grid, weight)
        best, before = loops.priced(code), math.inf
        while best.cost < before:
            best, before = loops.cheaper(best, loops.descended(best)), best.cost
        return best.code


class _Priced(NamedTuple):
    code: GridCode
    slope: Tensor  # H d (out, in)
    cost: float  # ½ dᵀHd


class _Loops:
    """The sweeps over one weight, from and to codes in the weight's own order."""

    def __init__(self, state: TwoSidedState, grid: Grid, weight: Tensor, kept: Tensor | None = None) -> None:
        self.state, self.grid, self.weight, self.kept = state, grid, weight, kept
        self.sweeps = _sweeps(state.input_factor.device)

    def priced(self, code: GridCode) -> _Priced:
        """`code` with H d and ½ dᵀHd, d being its difference from the weight."""
        difference = self.grid.decode(code) - self.weight
        slope = self.state.curvature.matvec(difference)
        return _Priced(code, slope, float(torch.linalg.vecdot(difference, slope).double().sum()) / 2)

    def cheaper(self, best: _Priced, code: GridCode) -> _Priced:
        """The one that costs less."""
        return min(best, self.priced(code), key=lambda priced: priced.cost)

    def refitted(self, best: _Priced, steps: int) -> _Priced:
        """`best` with better scales, if they still are once rounded to the stored type."""
        scales = best.code.scales
        found = refit_scales(best.code, best.slope, self.state.curvature, self.grid, steps)
        stored = round_to(found, self.grid.dtype)
        kept = torch.where(stored.isfinite() & (stored != 0), stored, scales.scale)
        return self.cheaper(best, GridCode(best.code.codes, Scales(kept, scales.zero_point)))

    def fed_back(self, scales: Scales, start: Tensor) -> GridCode:
        """The codes that error feedback finds for given scales, from the values `start` on."""
        state, work = self.state, self._taken(start)
        return self._code(
            self.sweeps.feed_back(work, self._steps(scales), state.column_feedback, state.row_feedback), scales
        )

    def descended(self, best: _Priced) -> GridCode:
        """The codes after one pass of coordinate descent."""
        scales, gradient = best.code.scales, self._taken(best.slope)
        codes = self._taken(self.grid.steps(best.code, self.weight))
        self.sweeps.descend(codes, gradient, self._steps(scales), self.state.input_factor, self.state.output_factor)
        return self._code(codes, scales)

    def _steps(self, scales: Scales) -> Steps:
        """The grid of each weight as the sweeps take it."""
        values = (scales.scale, self.grid.lowest - scales.zeros, self.grid.highest - scales.zeros)
        scale, lowest, highest = (_loop(each[self.state.rows].T) for each in values)
        group = (self.state.columns // self.grid.group_width(len(self.state.columns))).to(scale.device)
        if self.kept is None:
            return Steps(scale, lowest, highest, group, self.grid.dtype)
        kept = self._taken(
            self.kept.to(self.weight)
        )  # what is dropped has the code of zero to choose from, and no other
        each = torch.arange(len(group), device=scale.device)
        return Steps(scale[group], lowest[group] * kept, highest[group] * kept, each, self.grid.dtype)

    def _taken(self, matrix: Tensor) -> Tensor:
        """A copy of a matrix (out, in) as the loops take it: transposed, both sides in their order."""
        return _loop(matrix.T[self.state.columns][:, self.state.rows])

    def _code(self, codes: Tensor, scales: Scales) -> GridCode:
        found = torch.empty_like(self.weight)
        found[self.state.rows[:, None], self.state.columns] = codes.T.to(found)
        if scales.zero_point is not None:
            found += self.grid.expand(scales.zero_point, found.shape[1])
        return GridCode(found.to(torch.int8), scales)


def _falling(factor: Tensor) -> Tensor:
    return torch.argsort(factor.diagonal(), descending=True, stable=True)


def _feedback(factor: Tensor, order: Tensor) -> Tensor:
    """U_j / U_jj of the upper triangular U with factor⁻¹ = UᵀU, in `order`."""
    rows, _ = read_backwards(inverse_of(kronecker_root(backwards_in(factor, order))))
    return _loop(rows)


def _loop(tensor: Tensor) -> Tensor:
    """`tensor` as the sweeps read it, where they run."""
    device = tensor.device if kernels.run_on(tensor.device) else torch.device("cpu")
    return tensor.to(device, torch.float32).contiguous()


def _sweeps(device: torch.device) -> TwoSidedSweeps:
    """The sweeps over tensors on `device`."""
    if not kernels.run_on(device):
        return two_sided_loops
    from hesse.solvers.kernels import two_sided

    return two_sided
