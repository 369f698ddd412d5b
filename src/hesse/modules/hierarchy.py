"""Elements of a network taken out from the large to the small, each judged by the measured loss."""

from collections.abc import Callable, Mapping, Sequence

import torch

from hesse.curvature import Objective
from hesse.modules.tolerance import chunks, restore, zero
from hesse.partitions import Group

Level = Callable[[Objective, Sequence[Group]], list[list[Group]]]  # the elements of a site, by its groups that are left


def within_hierarchy(
    objective: Objective, sites: Mapping[str, Sequence[Group]], tolerance: float
) -> dict[str, list[Group]]:
    """The groups of each site that go, so that the measured loss rises by at most `tolerance`.

    First whole sites (all heads of an attention, all neurons of a feed-forward part), then the heads of those that are
    left one by one, then eighths of their neurons or channels. Of each level every element is measured without all that
    went at the levels before; then each gets its turn, the cheapest first, and goes if the loss stays within the
    tolerance without it and all before it. `objective.model` is left with them at zero. Source: AxFormer (Nagarajan et
    al., 2020, arXiv:2010.03688), without its attention to a few positions alone.
    """
    allowed = objective.value() + tolerance
    gone: dict[str, list[Group]] = {site: [] for site in sites}
    for level in (_sites, _heads, _chunks):
        elements = [
            (site, element)
            for site, groups in sites.items()
            if (left := without(groups, gone[site]))
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
                gone[site] += element
            else:
                restore(objective, saved)
    return gone


def without(groups: Sequence[Group], gone: Sequence[Group]) -> list[Group]:
    """Those groups that are not gone."""
    lost = {id(group) for group in gone}
    return [group for group in groups if id(group) not in lost]


def _sites(objective: Objective, groups: Sequence[Group]) -> list[list[Group]]:
    return [list(groups)]


def _heads(objective: Objective, groups: Sequence[Group]) -> list[list[Group]]:
    return [[group] for group in groups if group.kind == "heads"]


def _chunks(objective: Objective, groups: Sequence[Group]) -> list[list[Group]]:
    return [] if groups[0].kind == "heads" else chunks(objective, groups, len(groups))
