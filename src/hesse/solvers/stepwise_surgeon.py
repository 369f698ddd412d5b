"""Prune many weights per step by their single costs: WoodFisher, and M-FAC's in steps."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hesse.constraints import Constraint, Sparse, SparseCode
from hesse.curvature import BlockRankOneSum, Curvature, RankOneSum
from hesse.curvature.rank_one_sum import CHUNK
from hesse.errors import UnsupportedProduct
from hesse.solvers.base import Solver, float32_bytes, require_constraint
from hesse.solvers.refit import OfGradients, best_values, kept_part


@dataclass(frozen=True)
class StepwiseSurgeon(Solver):
    """Prune in `steps`: in each, remove the weights of the least w_i² / (2 [H⁻¹]_ii) together, then refit the others.

    Use it where a layer is too wide for GreedySurgeon: removing many weights per step ignores how each removal changes
    the cost of the next one, and under a RankOneSum a step costs out · in · m².

    H is restricted to the weights still kept before each step. They move to where ½ dᵀHd is least, by
    -H⁻¹E_Q ([H⁻¹]_QQ)⁻¹ w_Q for all removed weights Q. Each step keeps the same ratio of the weights. Equivalent to
    M-FAC's pruning (Frantar, Kurtic and Alistarh, 2021), with the joint update instead of the sum of single ones.

    The curvature must be a RankOneSum or a BlockRankOneSum, damped; the constraint a Sparse of single weights.
    """

    curvatures = (BlockRankOneSum, RankOneSum)

    steps: int = 1

    def compute(self, state: OfGradients, weight: Tensor, constraint: Constraint) -> SparseCode:
        constraint = require_constraint(self, constraint, Sparse)
        if constraint.block > 1:
            raise UnsupportedProduct(
                f"{type(self).__name__} counts the costs of single weights: for blocks use GreedySurgeon"
            )
        kept, values, part = torch.ones_like(weight, dtype=torch.bool), weight, state
        for number in _dropped(constraint, weight, self.steps):
            inverse = part.inverse_diagonal().to(weight)
            scores = torch.where(kept, values.square() / inverse, -1)  # what is removed stays removed
            after = constraint.mask(scores, number)
            removed = torch.where(kept & ~after, values / inverse, 0)
            remaining = kept_part(state, after)
            values = self._moved(state, part, remaining, weight, values, removed, after)
            kept, part = after, remaining
        return constraint.encode_masked(values, kept)

    def _moved(
        self,
        whole: OfGradients,
        before: OfGradients,
        after: OfGradients,
        weight: Tensor,
        values: Tensor,
        removed: Tensor,
        kept: Tensor,
    ) -> Tensor:
        """Return the values of the `kept` weights after a step, zeros elsewhere.

        `before` and `after` are the curvature of what was kept before and after it, `removed` w_i / [H⁻¹]_ii of the
        weights that the step removes, from `values`.
        """
        return best_values(whole, after, weight, kept)

    def workspace(self, shape: torch.Size, curvature: type[Curvature], constraint: Constraint, held: int = 0) -> int:
        if issubclass(curvature, BlockRankOneSum):
            return float32_bytes(shape, weights=9) + 4 * 6 * held
        part = min(CHUNK / shape.numel(), 1.0)  # of the gradients that is worked on in float64
        return float32_bytes(shape, weights=5) + math.ceil(4 * (2 + 3.5 * part) * held)


@dataclass(frozen=True)
class SummedSurgeon(StepwiseSurgeon):
    """Prune as StepwiseSurgeon does, but move by the sum of the updates that each removed weight alone asks for.

    Use it where H offers a product only, or to reproduce WoodFisher: the sum -Σ w_i H⁻¹e_i / [H⁻¹]_ii ignores that
    removed weights interact, so the result is no minimum and may cost more than zeroing them.

    Equivalent to WoodFisher (Singh and Alistarh, 2020) with one step, and to M-FAC (Frantar, Kurtic and Alistarh, 2021)
    with several.

    The curvature must be a RankOneSum or a BlockRankOneSum, damped; the constraint a Sparse of single weights.
    """

    def _moved(
        self,
        whole: OfGradients,
        before: OfGradients,
        after: OfGradients,
        weight: Tensor,
        values: Tensor,
        removed: Tensor,
        kept: Tensor,
    ) -> Tensor:
        return (values - before.solve(removed)) * kept


def _dropped(sparse: Sparse, weight: Tensor, steps: int) -> list[Tensor | None]:
    """Return how many weights are removed after each step; a pattern is chosen in one."""
    if sparse.of is not None:
        return [None]
    last = sparse.drop_counts(weight)
    whole = weight.numel() / len(last)
    kept = 1 - last / whole
    return [*(((1 - kept ** (step / steps)) * whole).round().long() for step in range(1, steps)), last]
