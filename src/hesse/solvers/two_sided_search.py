"""Search for the codes of one weight under a Kronecker curvature: error feedback, then descent and refits."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from hesse.constraints import Codebook, CodebookCode, Constraint, Grid, GridCode, Scales
from hesse.constraints.base import round_to
from hesse.curvature import Kronecker
from hesse.solvers.admm import ADMM, ADMMState
from hesse.solvers.refit import in_order, refit_scales, refit_values
from hesse.solvers.sweeps import kernels, two_sided
from hesse.solvers.sweeps.two_sided import GridLevels, TableLevels, TwoSidedSweeps


@dataclass(frozen=True, eq=False)
class TwoSidedState:
    """Both factors of a Kronecker in the order of the sweep, and the triangular factors that feed errors back."""

    curvature: Kronecker
    columns: Tensor  # (in,) indices, the inputs with the largest curvature first
    rows: Tensor  # (out,) indices, likewise
    input_factor: Tensor  # A (in, in) in that order
    output_factor: Tensor  # G (out, out) in that order
    column_feedback: Tensor  # (in, in) unit upper triangular: the rows of the inverse's factor over its diagonal
    row_feedback: Tensor  # (out, out)

    @cached_property
    def pruning(self) -> ADMMState:
        """The state of ADMM, which chooses the weights that a Sparse drops."""
        return ADMM().init(self.curvature)


AllowedSet = TypeVar("AllowedSet", bound=Constraint)
Code = TypeVar("Code", GridCode, CodebookCode)


class PricedCode(NamedTuple):
    """A code and its cost."""

    code: Any
    slope: Tensor  # H d (out, in), with d the difference from the weight
    cost: float  # ½ dᵀHd


class Search(ABC, Generic[AllowedSet, Code]):
    """Sweeps over one weight (out, in), with codes in the weight's own order before and after."""

    def __init__(self, state: TwoSidedState, constraint: AllowedSet, weight: Tensor) -> None:
        self.state, self.constraint, self.weight = state, constraint, weight

    def best_code(self, plain: Code, start: Tensor, passes: int, refit_steps: int) -> Code:
        """Return the codes of error feedback from the values `start`, improved `passes` times by refits and descent.

        Scales or values are at first those of `plain`; the result is never worse than `plain`.
        """
        best = self.cheaper(self.price(self.feed_back(plain, start)), plain)
        for _ in range(passes):
            best = self.cheaper(best, self.refit(best, refit_steps))
            best = self.cheaper(best, self.descend(best))
        return cast(Code, self.cheaper(best, self.refit(best, refit_steps)).code)

    def price(self, code: Code) -> PricedCode:
        """Return `code` with H d and ½ dᵀHd."""
        difference = self.constraint.decode(code) - self.weight
        slope = self.state.curvature.matvec(difference)
        return PricedCode(code, slope, float(torch.linalg.vecdot(difference, slope).double().sum()) / 2)

    def cheaper(self, best: PricedCode, code: Code) -> PricedCode:
        """Return the cheaper of two codes."""
        return min(best, self.price(code), key=lambda priced: priced.cost)

    def feed_back(self, template: Code, start: Tensor) -> Code:
        """Return the codes of error feedback from the values `start`, with the scales or values of `template`."""
        state, work = self.state, self.to_sweep_order(start)
        found = self.sweeps.feed_back(work, self.levels(template), state.column_feedback, state.row_feedback)
        return self.from_sweep_codes(self.from_sweep_order(found), template)

    def descend(self, best: PricedCode) -> Code:
        """Return the codes after one pass of coordinate descent."""
        gradient, codes = self.to_sweep_order(best.slope), self.to_sweep_order(self.sweep_codes(best.code))
        steps, state = self.levels(best.code), self.state
        self.sweeps.descend(codes, gradient, steps, state.input_factor, state.output_factor)
        return self.from_sweep_codes(self.from_sweep_order(codes), best.code)

    def to_sweep_order(self, matrix: Tensor) -> Tensor:
        """Return a copy of a matrix (out, in) for the loops: transposed, both sides in the order of the sweep."""
        return for_loops(matrix.T[self.state.columns][:, self.state.rows])

    def from_sweep_order(self, matrix: Tensor) -> Tensor:
        """Undo `to_sweep_order`."""
        found = torch.empty_like(self.weight)
        found[self.state.rows[:, None], self.state.columns] = matrix.T.to(found)
        return found

    @property
    def sweeps(self) -> TwoSidedSweeps:
        """The loops that round, compiled or as kernels."""
        return two_sided

    @abstractmethod
    def levels(self, code: Code) -> Any:
        """Return the allowed values of each weight, with the scales or values of `code`, for the sweeps."""

    @abstractmethod
    def sweep_codes(self, code: Code) -> Tensor:
        """Return the codes (out, in) as the sweeps count them."""

    @abstractmethod
    def from_sweep_codes(self, codes: Tensor, template: Code) -> Code:
        """Codes (out, in) as the sweeps count them, with the steps or values of `like`."""

    @abstractmethod
    def refit(self, best: PricedCode, steps: int) -> Code:
        """Return the same codes with better scales or values, after `steps` of conjugate gradients."""


class GridSearch(Search[Grid, GridCode]):
    """Search on a grid; the weights that are not `kept` have the code of zero."""

    def __init__(self, state: TwoSidedState, grid: Grid, weight: Tensor, kept: Tensor | None = None) -> None:
        super().__init__(state, grid, weight)
        self.kept = kept

    @property
    def sweeps(self) -> TwoSidedSweeps:
        if not kernels.run_on(self.state.input_factor.device):
            return two_sided
        from hesse.solvers.sweeps.kernels import two_sided as on_gpu

        return on_gpu

    def levels(self, code: GridCode) -> GridLevels:
        scales = code.scales
        values = (scales.scale, self.constraint.lowest - scales.zeros, self.constraint.highest - scales.zeros)
        scale, lowest, highest = (for_loops(each[self.state.rows].T) for each in values)
        group = (self.state.columns // self.constraint.group_width(len(self.state.columns))).to(scale.device)
        if self.kept is None:
            return GridLevels(scale, lowest, highest, group, self.constraint.dtype)
        # A dropped weight may only have the code of zero.
        kept = self.to_sweep_order(self.kept.to(self.weight))
        each = torch.arange(len(group), device=scale.device)
        return GridLevels(scale[group], lowest[group] * kept, highest[group] * kept, each, self.constraint.dtype)

    def sweep_codes(self, code: GridCode) -> Tensor:
        return self.constraint.steps(code, self.weight)

    def from_sweep_codes(self, codes: Tensor, template: GridCode) -> GridCode:
        if template.scales.zero_point is not None:
            codes = codes + self.constraint.expand(template.scales.zero_point, codes.shape[1])
        return GridCode(codes.to(torch.int8), template.scales)

    def refit(self, best: PricedCode, steps: int) -> GridCode:
        scales = best.code.scales
        found = refit_scales(best.code, best.slope, self.state.curvature, self.constraint, steps)
        stored = round_to(found, self.constraint.dtype)
        kept = torch.where(stored.isfinite() & (stored != 0), stored, scales.scale)
        return GridCode(best.code.codes, Scales(kept, scales.zero_point))


class CodebookSearch(Search[Codebook, CodebookCode]):
    """Search on a codebook for each row; its loops run on the CPU."""

    def levels(self, code: CodebookCode) -> TableLevels:
        return TableLevels(code.values[self.state.rows].to("cpu", torch.float32).contiguous())

    def sweep_codes(self, code: CodebookCode) -> Tensor:
        return code.codes.to(self.weight)

    def from_sweep_codes(self, codes: Tensor, template: CodebookCode) -> CodebookCode:
        return CodebookCode(codes.to(torch.uint8), template.values)

    def refit(self, best: PricedCode, steps: int) -> CodebookCode:
        found = refit_values(best.code, best.slope, self.state.curvature, steps)
        return in_order(best.code, round_to(found, self.constraint.dtype))


def for_loops(tensor: Tensor) -> Tensor:
    """Return `tensor` as the sweeps read it, on the device that they run on."""
    device = tensor.device if kernels.run_on(tensor.device) else torch.device("cpu")
    return tensor.to(device, torch.float32).contiguous()
