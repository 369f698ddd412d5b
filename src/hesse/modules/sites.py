"""The groups of a network in memory by site, the loss that they are judged by, and the network without some of them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from hesse.curvature import Loss, Objective
from hesse.errors import OptionError, UnsupportedModelError
from hesse.modules.preparation import dense_loss, stored_objective
from hesse.partitions import (
    GROUP_KINDS,
    Group,
    GroupParts,
    check_groups,
    check_slicing,
    loading_problem,
    trace_groups,
)
from hesse.passes.per_sample import rows_of
from hesse.scores import LossEvidence

BySite = dict[str, list[Group]]


@dataclass(frozen=True, eq=False)
class Removal:
    """The groups of each site to remove, and the predicted increase of the loss; None if the method predicts none.

    `rest` are the groups that stay, in the order in which they would be next.
    """

    removed: BySite
    predicted: float | None = None
    rest: BySite = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Smaller:
    """A network without some of its parts, and how many of those that there were it lost, by site.

    `difference` is that from the network with these parts at zero, as a share of the largest output, and `loading` the
    reason why transformers cannot load the network; None if it can.
    """

    model: nn.Module
    removed: dict[str, tuple[int, int]]
    kinds: Sequence[str]
    loading: str | None
    predicted: float | None = None
    difference: float = 0.0


class GroupStrategy(ABC):
    """A way to choose which groups are removed; its fields are its options, which it checks itself."""

    @abstractmethod
    def check(self, kinds: Sequence[str]) -> None:
        """Raise OptionError if an option has no meaning, or the method none for groups of one of these kinds."""

    @abstractmethod
    def choose(self, sites: "Sites") -> Removal:
        """Return the groups to remove; the weights of `sites.objective.model` may be changed on the way."""

    def finish(self, sites: "Sites", removal: Removal, smaller: nn.Module) -> None:  # noqa: B027
        """Change the network without these groups, in place, where the method does more than remove them."""

    def find(self, objective: Objective, kinds: Sequence[str], training: bool, seed: int) -> "Sites":
        """Trace the groups of these kinds, of all if there are "groups" among them, before anything is measured."""
        try:
            return Sites.trace(objective, () if "groups" in kinds else kinds, training, seed)
        except UnsupportedModelError:
            with suppress(OptionError):
                dense_loss(objective)  # NaN differs from itself, and then the data or weights are at fault
            raise

    def prune(self, sites: "Sites", kinds: Sequence[str]) -> Smaller:
        """Return the network without the groups that the method chooses."""
        removal = self.choose(sites)
        model, difference = sites.without(removal.removed)
        self.finish(sites, removal, model)
        removed = {site: (len(removal.removed[site]), len(groups)) for site, groups in sites.groups.items()}
        there = sorted({groups[0].kind for groups in sites.groups.values()}) if "groups" in kinds else kinds
        return Smaller(model, removed, there, loading_problem(model), removal.predicted, difference)


@dataclass(frozen=True, eq=False)
class Sites:
    """The groups of some kinds of a network by site, and its loss on data.

    `training` says if the network was in training mode, and `seed` is that of random choices.
    """

    objective: Objective
    groups: BySite
    training: bool = False
    seed: int = 0

    @classmethod
    def trace(cls, objective: Objective, kinds: Sequence[str], training: bool, seed: int) -> "Sites":
        """Trace the groups of the objective's model, and cut one of each site out to see that the network runs so.

        With no `kinds` those of heads, hidden units and channels that there are.

        Raises:
            OptionError: there are none.
            UnsupportedModelError: the network cannot be traced, or not be cut.
        """
        inputs = _some(objective)
        traced = trace_groups(objective.model, inputs, objective.call)
        there = {group.kind for group in traced.groups if group.kind != "experts"}
        chosen = tuple(kinds) or tuple(sorted(there)) or GROUP_KINDS[:3]
        sites = traced.sites(chosen) if traced.of_kinds(chosen) else {}
        check_groups(objective.model, traced, inputs, chosen, objective.call)
        return cls(objective, sites, training, seed)

    @cached_property
    def partition(self) -> GroupParts:
        """All groups as one partition of the parameters."""
        return GroupParts([group for groups in self.groups.values() for group in groups], self.objective.model)

    @cached_property
    def evidence(self) -> LossEvidence:
        """Return the evidence from which scores rank the groups."""
        return LossEvidence(self.objective, seed=self.seed)

    def without(self, removed: Mapping[str, Sequence[Group]]) -> tuple[nn.Module, float]:
        """Return the network without some groups, and how far it is from the network with them at zero."""
        groups = [group for some in removed.values() for group in some]
        if not groups:
            return deepcopy(self.objective.model), 0.0
        return check_slicing(self.objective.model, groups, _some(self.objective), self.objective.call)


def leave_one(removed: Sequence[Group], there: Sequence[Group]) -> list[Group]:
    """Return those of some groups at zero that can be cut out: one stays, at zero, where all of a site are."""
    return list(removed[1:] if len(removed) == len(there) else removed)


def pruning_objective(
    model: nn.Module,
    data: Iterable[Any],
    loss_function: Loss | nn.Module | None,
    forward: Callable[[nn.Module, Any], Tensor] | None,
) -> Objective:
    """Return the loss of a model in eval mode, which is changed to it; all of its parameters take gradients."""
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return stored_objective(model, data, loss_function, forward)


def freeze_as(model: nn.Module, smaller: nn.Module) -> None:
    """Have the parameters of `smaller` take gradients where those of `model` do, by their names."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    for name, parameter in smaller.named_parameters():
        parameter.requires_grad_(parameter.is_floating_point() and name not in frozen)


def _some(objective: Objective) -> Any:
    """Two samples, which show what the network does as well as more."""
    return rows_of(next(objective.batches())[0], slice(0, 2))
