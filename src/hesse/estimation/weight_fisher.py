"""The Fisher on layers' weights themselves, in nats per token: its diagonal, the blocks on it, or its gradients."""

from collections.abc import Collection
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from hesse.estimation import GradientBlocks, GradientSquares
from hesse.networks.network import Layer
from hesse.passes.backward import layer_part
from hesse.passes.recorded_batch import RecordedBatch
from hesse.passes.sample_gradients import sample_gradients
from hesse.processes import Processes

BLOCK_SIZE = 32  # weights of a row, whose curvature takes as many times the weights' own memory


class FisherNeeds(NamedTuple):
    """The layers whose rules need the Fisher on their weights."""

    diagonals: Collection[str] = ()  # per position: labels sampled, each position's gradient squared by itself
    blocks: Collection[str] = ()  # per sample: of all positions of a sample together
    gradients: Collection[str] = ()  # per sample, all of them: as many times the weights' own memory as samples

    @property
    def of_samples(self) -> bool:
        """Whether gradients of single samples are needed."""
        return bool(self.blocks or self.gradients)


NOTHING = FisherNeeds()


class WeightFisher:
    """Sums over passages of some layers: Σ (g xᵀ)² (out, in), Σ over samples of the blocks of g gᵀ, and all g."""

    def __init__(self, layers: Collection[Layer], needs: FisherNeeds) -> None:
        # Every weight as (out, in), however its module keeps it.
        parts = {name_of(layer): [replace(layer_part(layer), transposed=False)] for layer in layers}
        weights = [{name_of(layer): layer.weight for layer in layers if layer.name in chosen} for chosen in needs]
        self._squares = GradientSquares(parts, weights[0], "position")
        # All of them from the start, so that several processes add up the same.
        self._squares.sums = {
            name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights[0].items()
        }
        self._blocks = GradientBlocks(parts, weights[1], BLOCK_SIZE)
        self._parts, self._weights = parts, weights[2]
        self._gradients = {name: [weight.new_empty(0, *weight.shape)] for name, weight in weights[2].items()}

    def add(self, passage: RecordedBatch) -> None:
        """Add what a passage shows."""
        self._squares.add(passage)
        self._blocks.add(passage)
        for name, weight in self._weights.items():
            self._gradients[name] += sample_gradients(passage, name, self._parts[name], weight)

    def found(self, scale: float, processes: Processes) -> dict[str, Tensor]:
        """By the weights' names, sums times `scale` over all `processes`; without those that nothing reached."""
        sums = {**self._squares.sums, **{name: blocks.total for name, blocks in self._blocks.sums.items()}}
        for total in sums.values():
            processes.all_reduce(total)
        found = {name: scale * total for name, total in sums.items()}
        for name in self._weights:
            gradients = processes.all_gather(torch.cat(self._gradients.pop(name)))
            found[name] = gradients.mul_((scale * len(gradients)) ** 0.5)  # so that their mean g gᵀ is per token
        return {name: fisher for name, fisher in found.items() if bool(fisher.any())}


def name_of(layer: Layer) -> str:
    """What the weight of a layer is called."""
    return f"{layer.name}.weight"
