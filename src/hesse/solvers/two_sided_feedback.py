"""Error feedback over both sides of a Kronecker curvature, then coordinate descent with refitted scales."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hesse.constraints import Constraint, Grid, GridCode, Scales
from hesse.constraints.base import round_to
from hesse.curvature import Curvature, Kronecker
from hesse.errors import ConditioningError, UnsupportedProduct
from hesse.solvers.error_feedback import inverse_of
from hesse.solvers.refit_scales import refit_scales
from hesse.solvers.sweeps import Floats, descend, feed_back

BLOCK = 64  # columns whose errors reach those beyond them in one product


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


@dataclass(frozen=True)
class TwoSidedFeedback:
    """Rounding of a weight (out, in) that makes each error good by all weights after it, in its column and beyond.

    With H = G ⊗ A, the Cholesky factor of H⁻¹ is the Kronecker product of those of G⁻¹ and A⁻¹, so that Optimal Brain
    Surgeon's update of all weights left costs no more than that of their own row: column by column, and within a
    column row by row. With a diagonal G it is GPTQ. Then `passes` times the scales are refitted to the codes by
    `refit_steps` of conjugate gradients, and each code is changed where that lowers ½ tr(G d A dᵀ); a last refit
    follows. Never worse than rounding to nearest on the same grid.

    Choose it where the end loss's curvature is known (a Kronecker of Fisher factors) and quality counts. Needs factors
    that are positive definite: `Kronecker.with_damped_factors`. The loops run on the CPU, whatever the tensors'
    device. Source: the update of GPTQ (Frantar et al., 2022) on the curvature of K-FAC (Martens and Grosse, 2015).
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
        if not isinstance(constraint, Grid):
            raise UnsupportedProduct(f"TwoSidedFeedback solves Grid, not {type(constraint).__name__}")
        loops = _Loops(state, constraint, weight)
        scales = constraint.fit(weight)
        best = loops.cheaper(loops.priced(loops.fed_back(scales)), constraint.round(weight, scales))
        for _ in range(self.passes):
            best = loops.refitted(best, self.refit_steps)
            best = loops.cheaper(best, loops.descended(best))
        return loops.refitted(best, self.refit_steps).code


class _Priced(NamedTuple):
    code: GridCode
    slope: Tensor  # H d (out, in)
    cost: float  # ½ dᵀHd


class _Loops:
    """The compiled loops on one weight, from and to codes in the weight's own order."""

    def __init__(self, state: TwoSidedState, grid: Grid, weight: Tensor) -> None:
        self.state, self.grid, self.weight = state, grid, weight
        self.split = np.float32(0 if grid.dtype == torch.float32 else 2.0**23 * torch.finfo(grid.dtype).eps + 1)

    def priced(self, code: GridCode) -> _Priced:
        """`code` with H d and ½ dᵀHd, d being its difference from the weight."""
        difference = self.grid.decode(code) - self.weight
        slope = self.state.curvature.matvec(difference)
        return _Priced(
            code, slope, float(torch.linalg.vecdot(difference.flatten().double(), slope.flatten().double())) / 2
        )

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

    def fed_back(self, scales: Scales) -> GridCode:
        """The codes that error feedback finds for given scales."""
        work = self._taken(self.weight)
        codes, rows = torch.empty_like(work), self.state.row_feedback.numpy()
        for start, stop, settings in self._blocks(scales):
            columns = self.state.column_feedback[start:stop]
            errors = torch.empty_like(work[start:stop])
            within = columns[:, start:stop].contiguous().numpy()
            block = work[start:stop].numpy(), codes[start:stop].numpy(), errors.numpy()
            feed_back(*block, *settings, within, rows, self.split)
            work[stop:].addmm_(columns[:, stop:].T, errors, alpha=-1)
        return self._code(codes, scales)

    def descended(self, best: _Priced) -> GridCode:
        """The codes after one pass of coordinate descent."""
        scales, gradient = best.code.scales, self._taken(best.slope)
        zero_point = 0 if scales.zero_point is None else self.grid.expand(scales.zero_point, self.weight.shape[1])
        codes = self._taken(best.code.codes.to(self.weight) - zero_point)
        factor = self.state.output_factor.numpy()
        for start, stop, settings in self._blocks(scales):
            inputs = self.state.input_factor[start:stop]
            changes = torch.empty_like(codes[start:stop])
            within = inputs[:, start:stop].contiguous().numpy()
            block = codes[start:stop].numpy(), gradient[start:stop].numpy(), changes.numpy()
            descend(*block, *settings, within, factor, self.split)
            gradient[stop:].addmm_(inputs[:, stop:].T, changes)
        return self._code(codes, scales)

    def _blocks(self, scales: Scales) -> Iterator[tuple[int, int, tuple[Floats, Floats, Floats]]]:
        """Where each block of columns starts and stops; its scales, lowest and highest codes (columns, out).

        Codes are counted from the zero point.
        """
        zero_point = torch.zeros_like(scales.scale) if scales.zero_point is None else scales.zero_point
        bounds = (self.grid.lowest - zero_point, self.grid.highest - zero_point)
        scale, lowest, highest = (_loop(values[self.state.rows].T) for values in (scales.scale, *bounds))
        width = len(self.state.columns)
        group = self.state.columns.cpu() // self.grid.group_width(width)
        for start in range(0, width, BLOCK):
            stop = min(start + BLOCK, width)
            lines = group[start:stop]
            yield start, stop, (scale[lines].numpy(), lowest[lines].numpy(), highest[lines].numpy())

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
    backwards = factor[order][:, order].flip(0, 1)
    for matrix in (backwards, backwards.double()):
        lower, failed = torch.linalg.cholesky_ex(matrix)
        if not int(failed):
            upper = inverse_of(lower).flip(0, 1)
            return _loop(upper / upper.diagonal()[:, None])
    raise ConditioningError("a Kronecker factor is not positive definite: use more damping (with_damped_factors)")


def _loop(tensor: Tensor) -> Tensor:
    """`tensor` as the loops read it."""
    return tensor.to("cpu", torch.float32).contiguous()
