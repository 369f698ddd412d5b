"""The order in which each site's groups would go, and what that costs."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from hesse.curvature import Objective
from hesse.modules.group_budget import Ranking
from hesse.partitions import Group
from hesse.partitions.checking import ALIGNED
from hesse.partitions.experts import chosen_experts
from hesse.scores.group_surgeon import greedy_removal, independent_costs, refitted
from hesse.scores.groups import fisher_scores, magnitudes, random_scores, taylor_scores, trace_scores
from hesse.scores.readers import Reader, readers

Score = Callable[[Objective, Sequence[Group], int], Tensor]
SCORES: dict[str, Score] = {
    "random": random_scores,
    "magnitude": magnitudes,
    "taylor": taylor_scores,
    "fisher": fisher_scores,
    "hap": trace_scores,
}
WITH_READERS = ("heapr", "obs")
METHODS = (*SCORES, *WITH_READERS)
IN_NATS = ("fisher", "hap", *WITH_READERS)  # whose scores are increases of the loss


class Ranker:
    """Ranks the groups of sites by a method, and moves the weights that read them where the method does."""

    def __init__(
        self,
        objective: Objective,
        sites: Mapping[str, Sequence[Group]],
        method: str,
        cap: float,
        refit: bool,
        seed: int,
    ) -> None:
        self.objective, self.sites, self.method, self.cap, self._moves = objective, sites, method, cap, refit
        self._readers: dict[str, list[Reader]] = {}
        if refit or method in WITH_READERS:
            self._readers = dict(zip(sites, readers(objective, sites.values(), seed), strict=True))
        if method in WITH_READERS:
            self._scores = {site: independent_costs(found) for site, found in self._readers.items()}
        else:
            every = [group for groups in sites.values() for group in groups]
            scores = torch.split(SCORES[method](objective, every, seed), [len(groups) for groups in sites.values()])
            self._scores = dict(zip(sites, scores, strict=True))

    def rankings(self, share: float) -> list[Ranking]:
        """One for each site, of which no more than `share` will go."""
        return [self._ranking(site, groups, share) for site, groups in self.sites.items()]

    def _ranking(self, site: str, groups: Sequence[Group], share: float) -> Ranking:
        model, most = self.objective.model, min(int(self.cap * len(groups)), len(groups) - 1)
        if groups[0].kind == "experts":
            most = min(most, len(groups) - chosen_experts(model.get_submodule(groups[0].site.rpartition(".")[0])))
        fused = groups[0].produced[0].stack is not None and len(groups) % ALIGNED == 0
        step = ALIGNED if fused and most >= ALIGNED else 1
        if self.method == "obs":
            order, costs = greedy_removal(self._readers[site], min(most, int(share * len(groups)) + step))
            gone = set(order)
            order += [place for place in range(len(groups)) if place not in gone]
        else:
            scores = self._scores[site]
            order = scores.argsort().tolist()
            costs = scores[order].tolist()
        return Ranking(site, [groups[place] for place in order], costs, groups[0].parameters(model), most, step)

    def refit(self, gone: Mapping[str, Sequence[Group]]) -> None:
        """Let what is left make good what goes, in the objective's own model, if that is wanted."""
        for site, groups in gone.items() if self._moves else ():
            places = [self.sites[site].index(group) for group in groups]
            for reader in self._readers[site] if places else ():
                reader.write(self.objective.model, refitted(reader, places))
