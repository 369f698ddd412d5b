"""Choose a share of zero tiles for each layer, at a common slope of cost over sparsity (LPViT)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hesse.curvature import Objective
from hesse.errors import OptionError
from hesse.estimation import per_sample_gradients
from hesse.methods import find_method
from hesse.planning.planners import PLANNERS
from hesse.planning.problem import Candidate, ChoiceGroup, Problem

GradientKind = Literal["mean", "sampled", "empirical"]


@dataclass(frozen=True, eq=False)
class TilePlan:
    """Masks of the kept tiles of each parameter, and their predicted cost."""

    masks: dict[str, Tensor]  # in the parameters' shapes, true where a weight is kept
    shares: dict[str, float]  # of zeros
    predicted: float  # in the unit of the loss
    kept: float  # the share that remains of the total cost of all weights, such as multiplications

    def apply(self, objective: Objective) -> None:
        """Set all weights outside of the masks to zero."""
        for name, mask in self.masks.items():
            objective.named[name].data.mul_(mask)


@dataclass(frozen=True, eq=False)
class TileCosts:
    """Costs of removing tiles of one matrix: gᵀd + ½ dᵀ((1/m) Σ g_i g_iᵀ + λI) d, with d = -w in the tiles."""

    slope: Tensor  # gᵀd of each tile (rows, columns), or zeros
    along: Tensor  # g_iᵀd (m, rows, columns)
    squares: Tensor  # ‖w‖² (rows, columns)
    damping: float

    def order(self) -> Tensor:
        """Return the tiles (all,) in order of the cost of removing each alone."""
        alone = self.slope + 0.5 * self.along.square().mean(0) + 0.5 * self.damping * self.squares
        return alone.flatten().argsort(stable=True)

    def curve(self) -> Tensor:
        """Return the joint cost (all + 1,) of the first k tiles of the order, for k from 0 to all."""
        order = self.order()
        along = self.along.flatten(1)[:, order].cumsum(1).square().mean(0)
        parts = self.slope.flatten()[order].cumsum(0) + 0.5 * along
        costs = parts + 0.5 * self.damping * self.squares.flatten()[order].cumsum(0)
        return torch.cat([costs.new_zeros(1), costs])


def plan_tiles(
    objective: Objective,
    kept: float,
    *,
    tile: tuple[int, int] = (4, 4),
    gradients: GradientKind = "sampled",
    damping: float = 1.0,
    cost: Mapping[str, float] | None = None,
    levels: int = 32,
    seed: int = 0,
    method: str = "lpvit",
) -> TilePlan:
    """Choose the tiles (rows, columns) of each matrix of the objective to keep, for a share `kept` of the total cost.

    `gradients="sampled"` and "empirical" use the gradients of single samples, whose mean square is a Fisher (of labels
    drawn from the model, or of the data's labels), and no slope, which is zero at the end of training; λ is `damping`
    times the Fisher's mean eigenvalue. "mean" is LPViT's own form, gᵀd + ½ dᵀ(gg' + λI)d with the gradient g of the
    whole loss and λ = `damping` times its mean square; if g is small, its predictions for such large tiles are noise.
    Fewer than `kept` remain if it predicts that the loss decreases.

    `cost` is the cost per weight of a parameter, such as the number of positions it is applied at (for multiplications)
    or joules; by default all weights cost the same. A layer keeps at least one tile. Source: LPViT (Xu et al., 2024,
    arXiv:2407.02068).

    Raises:
        OptionError: a parameter is not a matrix or does not divide into tiles, or `kept` is invalid or not reachable.
    """
    if not 0 < kept <= 1:
        raise OptionError(f"the share to keep is {kept}: give one above 0 and at most 1, such as 0.5")
    for name, parameter in objective.named.items():
        if parameter.ndim != 2 or parameter.shape[0] % tile[0] or parameter.shape[1] % tile[1]:
            raise OptionError(
                f"{name} {tuple(parameter.shape)} does not divide into tiles of {tile[0]} × {tile[1]}: leave it out of "
                "the objective's names, or choose another tile"
            )
    costs = _tile_costs(objective, tile, gradients, damping, seed)
    each = {name: 1.0 if cost is None else cost[name] for name in costs}
    unit = max(min(each.values()), 1e-12)
    groups, counts, gained = [], list[list[int]](), 0.0
    for name, own in costs.items():
        curve, number = own.curve(), own.squares.numel()
        least = float(curve[:-1].min())  # negative if the gradient predicts that removing weights helps
        gained += least
        dropped = sorted({round(number * level / levels) for level in range(levels)} - {number})
        weight = round(each[name] / unit * tile[0] * tile[1])
        candidates = [Candidate(f"{k}", weight * (number - k), float(curve[k]) - least) for k in dropped]
        groups.append(ChoiceGroup(name, tuple(candidates)))
        counts.append(dropped)
    problem = Problem(tuple(groups))
    whole = sum(group.candidates[0].size for group in groups)
    choice = PLANNERS.find(find_method(method, "plan_tiles").solver)(problem, int(kept * whole))
    removed = {name: own[place] for name, own, place in zip(costs, counts, choice, strict=True)}
    masks = {name: _mask(costs[name], removed[name], tile) for name in costs}
    shares = {name: float((~mask).sum()) / mask.numel() for name, mask in masks.items()}
    return TilePlan(masks, shares, problem.loss(choice) + gained, problem.size(choice) / whole)


def _tile_costs(
    objective: Objective, tile: tuple[int, int], gradients: GradientKind, damping: float, seed: int
) -> dict[str, TileCosts]:
    squares = {name: _tiled(p.detach().double().square(), tile) for name, p in objective.named.items()}
    if gradients == "mean":
        mean = objective.gradient()
        along, level = _along(objective, mean[None], tile), float(mean.double().square().mean())
        slopes = {name: own[0] for name, own in along.items()}
    else:
        parts, total, count = [], 0.0, 0
        for rows in per_sample_gradients(objective, gradients, seed=seed):
            parts.append(_along(objective, rows, tile))
            total, count = total + float(rows.double().square().sum()), count + len(rows)
        factor = (objective.scale * count) ** 0.5  # so that their mean square is in the unit of the loss
        along = {name: factor * torch.cat([part[name] for part in parts]) for name in squares}
        level = total * objective.scale / objective.size
        slopes = {name: torch.zeros_like(own) for name, own in squares.items()}
    return {name: TileCosts(slopes[name], along[name], squares[name], damping * level) for name in squares}


def _along(objective: Objective, gradients: Tensor, tile: tuple[int, int]) -> dict[str, Tensor]:
    """Return ⟨g, -w⟩ in each tile of each parameter (m, rows, columns), for flat gradients (m, size)."""
    pieces = zip(objective.named.items(), objective.split(gradients), strict=True)
    return {name: -_tiled(piece.double() * parameter.detach().double(), tile) for (name, parameter), piece in pieces}


def _tiled(entries: Tensor, tile: tuple[int, int]) -> Tensor:
    """Return the sums of (..., out, in) over tiles (..., rows, columns)."""
    rows, columns = entries.shape[-2:]
    cut = entries.reshape(*entries.shape[:-2], rows // tile[0], tile[0], columns // tile[1], tile[1])
    return cut.sum((-3, -1))


def _mask(costs: TileCosts, removed: int, tile: tuple[int, int]) -> Tensor:
    kept = torch.ones(costs.squares.numel(), dtype=torch.bool, device=costs.squares.device)
    kept[costs.order()[:removed]] = False
    return kept.view(costs.squares.shape).repeat_interleave(tile[0], 0).repeat_interleave(tile[1], 1)
