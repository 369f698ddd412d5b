"""Evidence that scores judge parts by: weights alone, or the loss of a network on data."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from hesse.curvature import Objective, RankOneSum
from hesse.curvature.objective import Batch
from hesse.errors import OptionError
from hesse.estimation import estimate_curvatures
from hesse.partitions import GroupParts, Partition
from hesse.passes.per_sample import FisherKind
from hesse.scores.attack import Attack
from hesse.scores.readers import Reader, find_readers

DAMPING = 1e-4  # of the sum of gradients, as a share of its mean eigenvalue in the span of the gradients


@dataclass(frozen=True, eq=False)
class StoredWeights:
    """Weights alone, by parameter: for scores that need no data."""

    tensors: Mapping[str, Tensor]
    seed: int = 0

    def weights(self, partition: Partition) -> dict[str, Tensor]:
        """Return the weights of the partition's parameters, in the precision of its sums."""
        return {name: partition.exact(self.tensors[name]) for name in partition.shapes}


@dataclass(frozen=True, eq=False)
class LossEvidence:
    """The loss of a network in memory on data, and what was estimated of it; nothing is estimated twice.

    `kind` is that of the Fisher, `seed` of random choices and sampled labels, and `attack` moves the inputs that "mad"
    looks at.
    """

    objective: Objective
    kind: FisherKind = "sampled"
    seed: int = 0
    attack: Attack | None = None
    _readers: list[tuple[GroupParts, dict[str, list[Reader]]]] = field(default_factory=list, repr=False)

    def weights(self, partition: Partition) -> dict[str, Tensor]:
        """Return the weights of the partition's parameters, in the precision of its sums."""
        known = dict(self.objective.model.named_parameters())
        return {name: partition.exact(known[name].detach()) for name in partition.shapes}

    def on(self, partition: Partition) -> Objective:
        """Return the loss as a function of the partition's parameters alone."""
        names = tuple(partition.shapes)
        return self.objective if names == self.objective.names else replace(self.objective, names=names)

    @cached_property
    def attacked(self) -> list[Batch]:
        """The data, with inputs that the attack moved.

        Raises:
            OptionError: no attack is given.
        """
        if self.attack is None:
            raise OptionError("the score mad needs attacked inputs: give attack=hesse.scores.Attack(radius=...)")
        return self.attack.on(self.objective)

    @cached_property
    def fisher_gradients(self) -> RankOneSum:
        """λI + 1/m Σ g gᵀ of whole samples' gradients g in all parameters of the objective as one vector."""
        estimates = estimate_curvatures(self.objective, ["rank-one"], self.kind, "sample", seed=self.seed)
        if estimates.rank_one is None:
            raise OptionError("the objective has no parameters to take gradients of")
        return estimates.rank_one.damped(DAMPING, of="range")

    def readers(self, partition: GroupParts) -> dict[str, list[Reader]]:
        """Return by site the layers that read its groups, with curvatures from one pass.

        Raises:
            UnsupportedModelError: a group is read by what is no linear or convolutional layer.
        """
        for known, readers in self._readers:
            if known is partition:
                return readers
        sites = {site: [partition.groups[number] for number in own] for site, own in partition.sites.items()}
        readers = dict(zip(sites, find_readers(self.objective, sites.values(), self.seed), strict=True))
        self._readers.append((partition, readers))
        return readers

    @torch.no_grad()
    def measured(self, partition: Partition) -> Tensor:
        """Return by how much the loss rises where a part is zero (parts,) in float64, one part after another."""
        produced = partition.restricted("produced")
        known = dict(self.objective.model.named_parameters())
        dense, increases = self.objective.value(), []
        for part in range(produced.count):
            saved = {name: known[name].detach().clone() for name in produced.shapes}
            for name, mask in produced.masks([part]).items():
                known[name].masked_fill_(mask.to(known[name].device), 0)
            increases.append(self.objective.value() - dense)
            for name, weight in saved.items():
                known[name].copy_(weight)
        return torch.tensor(increases, dtype=torch.float64)
