"""Elements of a network removed from the large to the small, each judged by the measured loss: AxFormer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from hesse.curvature import Objective
from hesse.methods.strategies import STRATEGIES
from hesse.modules.sites import BySite, Removal, Sites, leave_one
from hesse.modules.tolerance import check_tolerance, eighths, restore, zero
from hesse.options import setting
from hesse.partitions import Group

Level = Callable[[Objective, Sequence[Group]], list[list[Group]]]  # the elements of a site, by its groups that are left


@dataclass(frozen=True)
class Hierarchy:
    """Remove elements from the large to the small so that the measured loss rises by at most `loss`.

    First whole sites (all heads of an attention, all hidden units of a feed-forward part), then the heads of those that
    are left one by one, then eighths of their hidden units or channels. Of each level every element is measured without
    all that the levels before removed; then each has its turn, the cheapest first, and is removed if the loss stays
    within the tolerance without it and all before it. Where all of a site are removed one group stays, at zero. Source:
    AxFormer (Nagarajan et al., 2020, arXiv:2010.03688), without its attention to a few positions alone.
    """

    loss: float | None = setting(None, "Tolerance: by how much the loss on the data may rise, in its unit.")

    def check(self, kinds: Sequence[str]) -> None:
        check_tolerance("axformer", self.loss, kinds)

    def choose(self, sites: Sites) -> Removal:
        removed = self.zeroed(sites)
        return Removal({site: leave_one(groups, sites.groups[site]) for site, groups in removed.items()})

    def finish(self, sites: Sites, removal: Removal, smaller: nn.Module) -> None:
        """Nothing is left to do."""

    def zeroed(self, sites: Sites) -> BySite:
        """Return the groups that are removed; `sites.objective.model` is left with them at zero."""
        assert self.loss is not None
        objective = sites.objective
        allowed = objective.value() + self.loss
        removed: BySite = {site: [] for site in sites.groups}
        for level in (_sites, _heads, _eighths):
            elements = [
                (site, element)
                for site, groups in sites.groups.items()
                if (left := without_removed(groups, removed[site]))
                for element in level(objective, left)
            ]
            alone = []
            for _, element in elements:
                saved = zero(objective, element)
                alone.append(objective.value())
                restore(objective, saved)
            for place in torch.tensor(alone, dtype=torch.float64).argsort(stable=True).tolist():
                site, element = elements[place]
                saved = zero(objective, element)
                if objective.value() <= allowed:
                    removed[site] += element
                else:
                    restore(objective, saved)
        return removed


def without_removed(groups: Sequence[Group], removed: Sequence[Group]) -> list[Group]:
    """Return those groups that are not removed."""
    lost = {id(group) for group in removed}
    return [group for group in groups if id(group) not in lost]


def _sites(objective: Objective, groups: Sequence[Group]) -> list[list[Group]]:
    return [list(groups)]


def _heads(objective: Objective, groups: Sequence[Group]) -> list[list[Group]]:
    return [[group] for group in groups if group.kind == "heads"]


def _eighths(objective: Objective, groups: Sequence[Group]) -> list[list[Group]]:
    return [] if groups[0].kind == "heads" else eighths(objective, groups, len(groups))


STRATEGIES.register("hierarchy", Hierarchy)
