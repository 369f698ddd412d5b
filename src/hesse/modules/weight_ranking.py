"""Single weights of a whole network removed by a score: all layers are ranked together, or each by itself."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hesse.constraints import Sparse
from hesse.curvature import GaussNewton, Objective, RankOneSum
from hesse.errors import OptionError
from hesse.layerwise.solved_layer import LayerReport
from hesse.methods.constraint_parts import parse_sparsity
from hesse.methods.strategies import STRATEGIES
from hesse.modules.group_ranking import RankingScope, Refit
from hesse.modules.preparation import dense_loss
from hesse.networks.network import Layer
from hesse.options import setting
from hesse.partitions import Tiles
from hesse.passes.per_sample import FisherKind
from hesse.scores import Attack, LossEvidence, find_score
from hesse.solvers.refit import best_values, kept_part


@dataclass(frozen=True)
class WeightRanking:
    """Set the weights of the lowest score to zero."""

    score: str
    sparsity: float | str = setting(0.5, "Share of zeros such as 0.5, or N kept of M: 2:4.")
    scope: RankingScope = setting(
        "network", "Where a share of zeros is counted: over the whole network, or in each site."
    )
    block: int = setting(1, "Neighbors in a row that are zero together, such as 4.")
    steps: int = setting(1, "How often scores are computed anew; each step leaves the same share of what is left.")
    refit: Refit | None = setting(None, "Move the weights that stay: least-squares or none; m-fac-network does.")
    kind: FisherKind = setting("sampled", "Labels of the Fisher: sampled from the model, or empirical.")
    attack: Attack | None = setting(None, "How inputs are moved, for the score mad.")

    @property
    def pattern(self) -> Sparse:
        """The sparsity as a constraint on one layer's matrix."""
        sparse = parse_sparsity(self.sparsity)
        return Sparse(sparse.amount, sparse.of, block=self.block)

    def check(self, layers: Sequence[Layer]) -> None:
        """Check the options, for some layers.

        Raises:
            OptionError: an option has no meaning, or a layer does not divide into the groups of a pattern.
        """
        score, pattern = find_score(self.score, "weights" if self.block == 1 else "tiles"), self.pattern
        if self.scope not in ("network", "site") or self.steps < 1:
            raise OptionError(
                f"the scope is 'network' or 'site' and steps are 1 or more, not {self.scope!r} and {self.steps}"
            )
        if self.refit not in (None, "least-squares", "none"):
            raise OptionError(f"refit is 'least-squares' or 'none', not {self.refit!r}")
        if self.refit == "least-squares" and self.score != "m-fac-network":
            raise OptionError(f"the score {score.name} has no curvature to refit weights under: use m-fac-network")
        if pattern.of is not None and self.steps > 1:
            raise OptionError(f"a pattern such as {self.sparsity} is reached in one step: leave steps out")
        for layer in layers if pattern.together > 1 else ():
            if layer.transposed:
                raise OptionError(f"{layer.name} is stored transposed: ignore it, or use hesse.compress for patterns")
            pattern.check(layer.weight.shape)

    def prune(self, objective: Objective, seed: int) -> tuple[float, float, float]:
        """Set weights of the objective's model to zero, in place.

        Return the loss before and after, and its increase as the exact Gauss-Newton matrix of the dense network
        predicts it.
        """
        before, dense = dense_loss(objective), _weights(objective)
        tiles = Tiles({name: parameter.shape for name, parameter in objective.named.items()}, (1, self.block))
        score, kept = find_score(self.score), torch.ones(tiles.count, dtype=torch.bool, device=dense.device)
        for step in range(1, self.steps + 1):
            evidence = LossEvidence(objective, self.kind, seed, self.attack)
            costs = score.costs(evidence, tiles).to(dense.device)
            stays = self._stay(tiles, torch.where(kept, costs, -torch.inf), step)
            curvature = None if self.refit == "none" else score.curvature(evidence)
            if isinstance(curvature, RankOneSum):
                alive = kept_part(curvature, kept)
                _put(objective, best_values(alive, kept_part(alive, stays), _weights(objective), stays))
            else:
                like = {name: parameter.detach() for name, parameter in objective.named.items()}
                masks = tiles.spread(stays, like)
                _put(objective, _weights(objective) * objective.join([masks[name] for name in objective.names]))
            kept = stays
        after, change = objective.value(), _weights(objective) - dense
        _put(objective, dense)
        predicted = GaussNewton(objective=objective).quadratic(change)
        _put(objective, dense + change)
        return before, after, predicted

    def _stay(self, tiles: Tiles, costs: Tensor, step: int) -> Tensor:
        """Return the mask (parts,) of the tiles that stay after a step."""
        pattern = self.pattern
        if pattern.of is not None:
            return torch.cat([pattern.mask(costs).flatten() for costs in tiles.split(costs).values()])
        share = Sparse(1 - (1 - pattern.amount) ** (step / self.steps))
        rows = [own.flatten() for own in tiles.split(costs).values()] if self.scope == "site" else [costs]
        return torch.cat([share.mask(row[None])[0] for row in rows])

    def report(self, layer: Layer) -> LayerReport:
        """Return the record of one pruned layer."""
        weight = layer.weight.detach()
        share = 1 - int(torch.count_nonzero(weight)) / weight.numel()
        stored = Sparse(min(share, 1 - 1 / weight.numel()), dtype=weight.dtype)
        return LayerReport(
            name=layer.name,
            shape=(weight.shape[0], weight.shape[1]),
            method=f"{self.score} × Sparse",
            tokens=0,
            damping=0.0,
            bits_per_weight=stored.bits_per_weight(weight.shape),
            sparsity=share,
            rank=None,
            predicted_loss_increase=None,
            relative_output_error=None,
        )


def _weights(objective: Objective) -> Tensor:
    """The objective's parameters as one vector (size,)."""
    return objective.join([parameter.detach() for parameter in objective.parameters])


@torch.no_grad()
def _put(objective: Objective, weights: Tensor) -> None:
    for parameter, piece in zip(objective.parameters, objective.split(weights), strict=True):
        parameter.copy_(piece)


STRATEGIES.register("weight_ranking", WeightRanking)
