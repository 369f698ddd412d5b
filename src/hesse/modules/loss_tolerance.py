"""Groups removed while the measured loss stays within a tolerance: PAGCP site by site, AxFormer from the large on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hesse.curvature import Objective
from hesse.errors import OptionError
from hesse.methods.strategies import STRATEGIES
from hesse.modules.group_ranking import KEEP, share_removed
from hesse.modules.sites import BySite, GroupStrategy, Removal, Sites, leave_one
from hesse.options import setting
from hesse.partitions import Group, GroupParts
from hesse.scores import StoredWeights, find_score

STEPS = 8  # parts of a site that are removed in one step
Level = Callable[[Objective, Sequence[Group]], list[list[Group]]]  # the elements of a site, by its groups that are left


@dataclass(frozen=True)
class SiteTolerance(GroupStrategy):
    """Remove groups site by site so that the measured loss rises by at most `loss`.

    Sites come in the order of their parameters, the largest first, each in the network without all before it: an eighth
    of its groups after another, the smallest weights first, until the loss would have risen by more than the site's
    share of the tolerance (what sites before it left is added), or only the share `keep` of the site is left. Source:
    PAGCP (Ye et al., 2023, arXiv:2303.11923), one task.
    """

    loss: float | None = setting(None, "Tolerance: by how much the loss on the data may rise, in its unit.")
    keep: float = setting(KEEP, "Share of each site's groups that stays at least.")

    def check(self, kinds: Sequence[str]) -> None:
        check_tolerance("pagcp", self.loss, kinds)
        if not 0 < self.keep < 1:
            raise OptionError(f"keep is {self.keep}, but must be a share of each site between 0 and 1")

    def choose(self, sites: Sites) -> Removal:
        assert self.loss is not None
        objective, start = sites.objective, sites.objective.value()
        sizes = {site: len(groups) * groups[0].parameters(objective.model) for site, groups in sites.groups.items()}
        removed = {}
        for turn, site in enumerate(sorted(sites.groups, key=lambda site: -sizes[site]), 1):
            groups = sites.groups[site]
            chosen = self._of_site(objective, groups, start + self.loss * turn / len(sites.groups))
            removed[site] = leave_one(chosen, groups)
        return Removal(removed)

    def _of_site(self, objective: Objective, site: Sequence[Group], allowed: float) -> list[Group]:
        """Set groups of a site to zero while the loss is within what is allowed."""
        most = min(round(share_removed(self.keep) * len(site)), len(site) - 1)
        removed: list[Group] = []
        for more in eighths(objective, site, most):
            saved = zero(objective, more)
            if not objective.value() <= allowed:
                restore(objective, saved)
                break
            removed += more
        return removed


@dataclass(frozen=True)
class Hierarchy(GroupStrategy):
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


def check_tolerance(method: str, loss: float | None, kinds: Sequence[str]) -> None:
    """Check the options that methods share which measure the loss.

    Raises:
        OptionError: there is no tolerance, or experts would be judged.
    """
    if loss is None:
        raise OptionError(f"{method} needs a tolerance: give loss=0.05, by how much the loss on the data may rise")
    if not loss >= 0:
        raise OptionError(f"loss is {loss}, but must be 0 or more, in the unit of the loss")
    if "experts" in kinds:
        raise OptionError(f"{method} sets groups to zero, and an expert with zero weights is still chosen: use fisher")


def eighths(objective: Objective, site: Sequence[Group], most: int) -> list[list[Group]]:
    """Return the `most` groups of a site with the smallest weights, an eighth of the site after another."""
    weights = StoredWeights({name: weight.detach() for name, weight in objective.model.named_parameters()})
    squares = find_score("magnitude").costs(weights, GroupParts(site, objective.model))
    order, size = [site[place] for place in squares.argsort().tolist()][:most], max(len(site) // STEPS, 1)
    return [order[start : start + size] for start in range(0, len(order), size)]


def zero(objective: Objective, groups: Sequence[Group]) -> dict[str, Tensor]:
    """Set what makes some groups to zero, and return the parameters as they were."""
    known = dict(objective.model.named_parameters())
    pieces = [piece for group in groups for piece in group.produced if piece.parameter in known]
    saved = {piece.parameter: known[piece.parameter].detach().clone() for piece in pieces}
    with torch.no_grad():
        for piece in pieces:
            piece.fill(known[piece.parameter], 0)
    return saved


def restore(objective: Objective, saved: dict[str, Tensor]) -> None:
    """Undo `zero`."""
    known = dict(objective.model.named_parameters())
    with torch.no_grad():
        for name, tensor in saved.items():
            known[name].copy_(tensor)


STRATEGIES.register("site_tolerance", SiteTolerance)
STRATEGIES.register("hierarchy", Hierarchy)
