"""Many weights pruned at once by what each alone would cost: WoodFisher, and M-FAC's in steps."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hesse.constraints import Constraint, Sparse, SparseCode
from hesse.curvature import BlockRankOneSum, Curvature, RankOneSum
from hesse.errors import UnsupportedProduct
from hesse.solvers.base import as_kind
from hesse.solvers.refit import best_values, kept_part


@dataclass(frozen=True)
class StepwiseSurgeon:
    """In each of `steps` the weights of the least w_i² / (2 [H⁻¹]_ii) go together, H⁻¹ being that of what is left then.

    With `joint`, what is kept then moves to where ½ dᵀHd is least, by -H⁻¹E_Q ([H⁻¹]_QQ)⁻¹ w_Q for all weights Q that
    are gone. Without, by the sum of what each of them alone would ask for, -Σ w_i H⁻¹e_i / [H⁻¹]_ii, as if they did not
    feel one another: cheaper where H is a product only, and no minimum. Steps leave as many weights, in ratio, each.

    Use it where a layer is too wide for GreedySurgeon, which counts what all that is gone has changed in the cost of
    every next weight: under a RankOneSum a step costs out · in · m². Needs one of these, or a BlockRankOneSum, damped.
    Source: WoodFisher (Singh and Alistarh, 2020: one step, sums), M-FAC (Frantar, Kurtic and Alistarh, 2021).
    """

    steps: int = 1
    joint: bool = True

    def init(self, curvature: Curvature) -> BlockRankOneSum | RankOneSum:
        if not isinstance(curvature, BlockRankOneSum | RankOneSum):
            raise UnsupportedProduct(
                f"StepwiseSurgeon needs a BlockRankOneSum or a RankOneSum, not a {type(curvature).__name__}"
            )
        return curvature

    def compute(self, state: BlockRankOneSum | RankOneSum, weight: Tensor, constraint: Constraint) -> SparseCode:
        constraint = as_kind(self, constraint, Sparse)
        if constraint.block > 1:
            raise UnsupportedProduct("StepwiseSurgeon counts the costs of single weights: for blocks use GreedySurgeon")
        kept, found, left = torch.ones_like(weight, dtype=torch.bool), weight, state
        for number in _dropped(constraint, weight, self.steps):
            inverse = left.inverse_diagonal().to(weight)
            scores = torch.where(kept, found.square() / inverse, -1)  # what is gone stays gone
            after = constraint.mask(scores, number)
            summed = None if self.joint else left.solve(torch.where(kept & ~after, found / inverse, 0))
            kept, left = after, kept_part(state, after)
            found = best_values(state, left, weight, kept) if summed is None else (found - summed) * kept
        return constraint.encode_masked(found, kept)


def _dropped(sparse: Sparse, weight: Tensor, steps: int) -> list[Tensor | None]:
    """How many weights are gone after each step; a pattern is chosen in one."""
    if sparse.of is not None:
        return [None]
    last = sparse.dropped(weight)
    whole = weight.numel() / len(last)
    kept = 1 - last / whole
    return [*(((1 - kept ** (step / steps)) * whole).round().long() for step in range(1, steps)), last]
