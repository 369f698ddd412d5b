"""A menu of offers with their costs, as a planning problem; a choice is a recipe."""

from typing import Any

import numpy as np

from hesse.errors import OptionError
from hesse.methods import Method
from hesse.methods.recipe import Recipe, Rule
from hesse.networks.network import CheckpointNetwork
from hesse.planning.budget import Budget
from hesse.planning.front import size_loss_front
from hesse.planning.menu import LayerGroup, Offer
from hesse.planning.planners import PLANNERS
from hesse.planning.problem import Candidate, Choice, ChoiceGroup, Problem
from hesse.planning.solve import smallest_within

FRONT_POINTS = 12
HEADER_ENTRY = 64  # bytes of a tensor's entry in the header of a safetensors file, without its name and offsets


class PricedMenu:
    """A menu of offers with their costs, as a planning problem."""

    def __init__(
        self,
        network: CheckpointNetwork,
        menu: list[LayerGroup],
        costs: dict[str, list[float]],
        planner: str = "knapsack",
    ) -> None:
        checkpoint = network.checkpoint
        self.menu, self.checkpoint, self.planner = menu, checkpoint, planner
        self.problem = Problem(
            tuple(
                ChoiceGroup(
                    group.name,
                    tuple(
                        Candidate(offer.label, offer.size, cost)
                        for offer, cost in zip(group.offers, costs[group.name], strict=True)
                    ),
                )
                for group in menu
            )
        )
        layers = [layer for group in menu for layer in group.layers]
        self.weights = sum(layer.weight.numel() for layer in layers)
        names = [*checkpoint.stored_names(), *(3 * [f"{layer.name}.weight_packed" for layer in layers])]
        dense = sum(network.tensors.dtype(f"{x.name}.weight").itemsize * x.weight.numel() for x in layers)
        entry = HEADER_ENTRY + 2 * len(str(checkpoint.file_bytes))
        header = sum(len(name.encode()) + entry for name in names)
        self.rest = checkpoint.stored_bytes - dense + header  # bytes that no choice changes

    def choose(self, budget: Budget) -> Choice:
        """Return the best choice within a budget.

        Raises:
            OptionError: no choice fits, or the dense model already fits.
        """
        if budget.loss is not None:
            choice = smallest_within(self.problem, budget.loss)
        else:
            choice = PLANNERS.find(self.planner)(self.problem, self._room(budget))
        if not any(group.offers[place].rule for group, place in zip(self.menu, choice, strict=True)):
            raise OptionError("the dense model is within this budget already: nothing is to be compressed")
        return choice

    def _room(self, budget: Budget) -> int:
        """Return the bytes that the planned layers may take.

        Raises:
            OptionError: the layers cannot be made so small.
        """
        least, whole = self.problem.smallest, self.checkpoint.file_bytes
        if budget.bits is not None:
            room = int(budget.bits * self.weights / 8)
            if room < least:
                smallest = _up(8 * least / self.weights, 3)
                raise OptionError(
                    f"{budget.bits:g} bits cannot be reached: the smallest mean is {smallest:g} bits, scales included"
                )
            return room
        wanted = budget.bytes_of(whole)
        if wanted < self.rest + least:
            raise OptionError(
                f"{wanted:,} bytes cannot be reached: the smallest size is {self.rest + least:,} bytes "
                f"({_up(100 * (self.rest + least) / whole, 1):g}%), of which {self.rest:,} are not planned, "
                "such as embeddings"
            )
        return wanted - self.rest

    def recipe(self, choice: Choice, method: Method, ignore: tuple[str, ...]) -> Recipe:
        """Return the choice as a recipe, with rules from the smallest scheme to the largest."""
        chosen: dict[str, tuple[Offer, list[LayerGroup]]] = {}
        for group, place in zip(self.menu, choice, strict=True):
            offer = group.offers[place]
            chosen.setdefault(offer.label, (offer, []))[1].append(group)
        alone, rules = list(ignore), list[Rule]()
        for offer, groups in sorted(chosen.values(), key=lambda entry: entry[0].size / _weights(entry[1][0])):
            patterns = tuple(pattern for group in groups for pattern in self._patterns(group))
            if offer.rule is None:
                alone += patterns
            else:
                rules.append(offer.rule.model_copy(update={"layers": patterns}))
        about = (
            f"planned: {self.problem.loss(choice):.4g} nats per token predicted, "
            f"{self.rest + self.problem.size(choice):,} bytes, "
            f"{8 * self.problem.size(choice) / self.weights:.3f} bits per planned weight"
        )
        return Recipe(method=method.name, about=about, rules=tuple(rules), ignore=tuple(alone))

    def _patterns(self, group: LayerGroup) -> list[str]:
        return [group.name] if "*" in group.name else [layer.name for layer in group.layers]

    def front(self, choice: Choice) -> list[dict[str, Any]]:
        """Return the best choices of all sizes, the chosen and the uniform ones, with sizes and predicted losses."""
        points = [self._point("front", "", point.choice) for point in size_loss_front(self.problem, FRONT_POINTS)]
        labels = dict.fromkeys(offer.label for group in self.menu for offer in group.offers if offer.rule is not None)
        for label in labels:
            places = [next((i for i, o in enumerate(g.offers) if o.label == label), None) for g in self.menu]
            if None not in places:
                points.append(self._point("uniform", label, tuple(place for place in places if place is not None)))
        return [*points, self._point("chosen", "", choice)]

    def _point(self, kind: str, label: str, choice: Choice) -> dict[str, Any]:
        size, loss = self.rest + self.problem.size(choice), self.problem.loss(choice)
        return {"kind": kind, "label": label, "bytes": size, "predicted": loss}


def _weights(group: LayerGroup) -> int:
    return sum(layer.weight.numel() for layer in group.layers)


def _up(value: float, digits: int) -> float:
    """Round up, so that the reported limit is always reachable."""
    return float(np.ceil(value * 10**digits) / 10**digits)
