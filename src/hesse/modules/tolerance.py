"""Channels pruned site by site under a tolerance of the measured loss."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hesse.curvature import Objective
from hesse.partitions import Group
from hesse.scores.group_sums import GroupSums, everything

STEPS = 8  # parts of a site that are taken at once


def within_tolerance(
    objective: Objective, sites: Mapping[str, Sequence[Group]], tolerance: float, amount: float
) -> dict[str, list[Group]]:
    """The groups of each site that go, so that the measured loss rises by at most `tolerance`.

    Sites are taken in the order of their parameters, the largest first, each in the network without all before it:
    an eighth of its groups after another, the smallest weights first, until the loss would have risen by more than
    the site's share of the tolerance (what those before it left is added), or the share `amount` of the site is gone.
    `objective.model` is left with them at zero. Source: PAGCP (Ye et al., 2023, arXiv:2303.11923), one task.
    """
    start = objective.value()
    sizes = {site: len(groups) * groups[0].parameters(objective.model) for site, groups in sites.items()}
    chosen = {}
    for turn, site in enumerate(sorted(sites, key=lambda site: -sizes[site]), 1):
        allowed = start + tolerance * turn / len(sites)
        chosen[site] = _of_site(objective, sites[site], allowed, amount)
    return chosen


def _of_site(objective: Objective, site: Sequence[Group], allowed: float, amount: float) -> list[Group]:
    most = min(round(amount * len(site)), len(site) - 1)
    gone: list[Group] = []
    for more in chunks(objective, site, most):
        saved = zero(objective, more)
        if not objective.value() <= allowed:
            restore(objective, saved)
            break
        gone += more
    return gone


def chunks(objective: Objective, site: Sequence[Group], most: int) -> list[list[Group]]:
    """The `most` groups of a site with the smallest weights, an eighth of the site after another."""
    sums = GroupSums.over(site, objective.model, everything)
    weights = dict(objective.model.named_parameters())
    squares = sums.of({name: weights[name].detach().double().square() for name in sums.names})
    order, size = [site[place] for place in squares.argsort().tolist()][:most], max(len(site) // STEPS, 1)
    return [order[start : start + size] for start in range(0, len(order), size)]


def zero(objective: Objective, groups: Sequence[Group]) -> dict[str, Tensor]:
    """Set what makes some groups to zero; the parameters as they were."""
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
