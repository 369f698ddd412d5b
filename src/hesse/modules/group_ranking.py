"""Groups removed by a score: the same share of each site, or one ranking over the whole network."""

import heapq
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from hesse.errors import OptionError
from hesse.methods.strategies import STRATEGIES
from hesse.modules.implant import Implant, implant
from hesse.modules.sites import BySite, GroupStrategy, Removal, Sites, pruning_objective
from hesse.options import setting
from hesse.partitions import Group
from hesse.partitions.experts import chosen_experts
from hesse.partitions.slicing import ALIGNED
from hesse.scores import find_score
from hesse.scores.surgeon import fitted_weight

RankingScope = Literal["site", "network"]
Refit = Literal["least-squares", "none"]
KEEP = 0.75


@dataclass(frozen=True)
class Ranking:
    """The groups of a site in their order of removal, what each adds to the cost, and its parameters.

    At most `most` groups may be removed, and a number that is the same everywhere is a multiple of `step`.
    """

    site: str
    groups: Sequence[Group]
    costs: Sequence[float]
    parameters: int
    most: int
    step: int = 1


@dataclass(frozen=True)
class GroupRanking(GroupStrategy):
    """Remove the groups of the lowest score."""

    score: str
    keep: float = setting(KEEP, "Share that stays, of each site's groups, or of all parameters in groups.")
    scope: RankingScope = setting("site", "Where the share is counted: in each site, or over the whole network.")
    least: float = setting(0.1, "Least share of each site's groups that stays.")
    refit: Refit | None = setting(None, "Refit the layers that read the groups: least-squares or none; obs does.")
    implant: Implant | None = setting(None, "Groups next in the ranking that become a low rank; for the score hap.")

    def check(self, kinds: Sequence[str]) -> None:
        if not 0 < self.keep < 1 or not 0 <= self.least < 1:
            raise OptionError(f"keep is {self.keep} and least {self.least}, but must be shares between 0 and 1")
        if self.scope not in ("site", "network"):
            raise OptionError(f"the scope is 'site' or 'network', not {self.scope!r}")
        if self.refit not in (None, "least-squares", "none"):
            raise OptionError(f"refit is 'least-squares' or 'none', not {self.refit!r}")
        if self.implant is not None and self.score != "hap":
            raise OptionError(f"an implant goes with the method hap, not with {self.score}")
        for kind in kinds or ("groups",):
            find_score(self.score, kind)
        if self._refits and "experts" in kinds:
            raise OptionError("a refit is of the layers that read a group, and an expert has its router there")
        refuse_nested(kinds)

    @property
    def _refits(self) -> bool:
        return self.refit == "least-squares" or (self.refit is None and self.score == "obs")

    def choose(self, sites: Sites) -> Removal:
        rankings = self.rankings(sites)
        numbers = (uniform_numbers if self.scope == "site" else shared_numbers)(rankings, share_removed(self.keep))
        removed = {r.site: list(r.groups[:number]) for r, number in zip(rankings, numbers, strict=True)}
        predicted = None
        if find_score(self.score).nats:
            predicted = sum(sum(r.costs[:number]) for r, number in zip(rankings, numbers, strict=True))
        if self._refits:
            refit_readers(sites, removed)
        rest = {r.site: list(r.groups[number:]) for r, number in zip(rankings, numbers, strict=True)}
        return Removal(removed, predicted, rest)

    def finish(self, sites: Sites, removal: Removal, smaller: nn.Module) -> None:
        if self.implant is None:
            return
        objective = sites.objective
        chosen = [
            group
            for site, rest in removal.rest.items()
            for group in rest[: round(self.implant.share * len(sites.groups[site]))]
        ]
        rows = _smaller_rows(objective.model, removal.removed, chosen)
        implant(pruning_objective(smaller, objective.data, objective.loss, objective.forward), rows, self.implant.rank)

    def rankings(self, sites: Sites) -> list[Ranking]:
        """Return a ranking for each site."""
        most = {site: self._most(sites, groups) for site, groups in sites.groups.items()}
        steps = {site: _step(groups, most[site]) for site, groups in sites.groups.items()}
        share = share_removed(self.keep) if self.scope == "site" else 1.0
        numbers = {
            site: min(most[site], int(share * len(groups)) + steps[site]) for site, groups in sites.groups.items()
        }
        orders = find_score(self.score).orders(sites.evidence, sites.partition, numbers)
        model, rankings = sites.objective.model, []
        for site, groups in sites.groups.items():
            order, costs = orders[site]
            size = groups[0].parameters(model)
            rankings.append(Ranking(site, [groups[n] for n in order], costs, size, most[site], steps[site]))
        return rankings

    def _most(self, sites: Sites, groups: Sequence[Group]) -> int:
        """Return how many groups of a site may be removed: one stays, and as many experts as a token is sent to."""
        most = min(int(share_removed(self.least) * len(groups)), len(groups) - 1)
        if groups[0].kind == "experts":
            block = sites.objective.model.get_submodule(groups[0].site.rpartition(".")[0])
            most = min(most, len(groups) - chosen_experts(block))
        return most


def share_removed(keep: float) -> float:
    """Return 1 - keep without binary rounding errors: exactly 0.3 for 0.7."""
    return round(1 - keep, 12)


def refuse_nested(kinds: Sequence[str]) -> None:
    """Raise OptionError if experts and the hidden units inside them would be removed in one call."""
    if {"experts", "hidden"} <= set(kinds):
        raise OptionError(
            "experts and hidden units in one ranking would count an expert's units twice: prune in two calls"
        )


def _step(groups: Sequence[Group], most: int) -> int:
    """The multiple in which groups of a site are removed: fused experts need rows of 16 bytes."""
    fused = groups[0].produced[0].stack is not None and len(groups) % ALIGNED == 0
    return ALIGNED if fused and most >= ALIGNED else 1


def uniform_numbers(rankings: Sequence[Ranking], amount: float) -> list[int]:
    """Return how many groups each site loses: the same share, rounded."""
    return [
        ranking.step * min(round(amount * len(ranking.groups) / ranking.step), ranking.most // ranking.step)
        for ranking in rankings
    ]


def shared_numbers(rankings: Sequence[Ranking], amount: float) -> list[int]:
    """Return how many groups each site loses: by cost a parameter, until the share `amount` of all is removed.

    Raises:
        OptionError: that is more than may be removed of all sites.
    """
    wanted = amount * sum(len(ranking.groups) * ranking.parameters for ranking in rankings)
    numbers = [0] * len(rankings)
    heap = [_next(rankings, place, 0) for place, ranking in enumerate(rankings) if ranking.most]
    heapq.heapify(heap)
    while wanted > 0.5 * min(ranking.parameters for ranking in rankings):
        if not heap:
            raise OptionError(
                f"a share of {amount} is more than may be removed of the layers: keep more, or give a smaller least"
            )
        _, place = heapq.heappop(heap)
        numbers[place] += 1
        wanted -= rankings[place].parameters
        if numbers[place] < rankings[place].most:
            heapq.heappush(heap, _next(rankings, place, numbers[place]))
    return numbers


def _next(rankings: Sequence[Ranking], place: int, number: int) -> tuple[float, int]:
    return rankings[place].costs[number] / rankings[place].parameters, place


def refit_readers(sites: Sites, removed: BySite) -> None:
    """Fit the layers that read the groups to the inputs that stay, in the objective's own model."""
    readers = sites.evidence.readers(sites.partition)
    for site, groups in removed.items():
        places = [sites.groups[site].index(group) for group in groups]
        for reader in readers[site] if places else ():
            reader.write(sites.objective.model, fitted_weight(reader, places))


def _smaller_rows(model: nn.Module, removed: BySite, chosen: Sequence[Group]) -> dict[str, list[int]]:
    """By layer of the smaller model, the outputs that the chosen groups are made of."""
    lost, rows = defaultdict[str, set[int]](set), defaultdict[str, list[int]](list)
    for group in (group for groups in removed.values() for group in groups):
        for piece in group.produced:
            lost[piece.parameter] |= set(piece.indices)
    for group in chosen:
        for piece in group.produced:
            name, _, key = piece.parameter.rpartition(".")
            if key == "weight" and isinstance(model.get_submodule(name), nn.Linear | nn.modules.conv._ConvNd):
                before = sorted(lost[piece.parameter])
                rows[name] += [index - bisect_left(before, index) for index in piece.indices]
    return dict(rows)


STRATEGIES.register("group_ranking", GroupRanking)
