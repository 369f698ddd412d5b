"""The Fisher on layers' weights themselves, in nats per token: its diagonal, or the blocks on it."""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from hesse.curvature import BlockAccumulator
from hesse.estimation import BackwardWalk, GradientSquares, Passage, layer_part, sample_gradients
from hesse.models.network import Block, Layer

BLOCK_SIZE = 32  # weights of a row, whose curvature takes as many times the weights' own memory


@dataclass(frozen=True)
class FisherNeeds:
    """The layers whose rules need the Fisher on their weights."""

    diagonals: Collection[str] = ()  # per position: labels sampled, each position's gradient squared by itself
    blocks: Collection[str] = ()  # per sample: of all positions of a sample together

    def __bool__(self) -> bool:
        return bool(self.diagonals or self.blocks)


class WeightFisher:
    """Sums over passages of one block: Σ (g xᵀ)² (out, in), and Σ over samples of the blocks of g gᵀ."""

    def __init__(self, block: Block, needs: FisherNeeds) -> None:
        diagonals = {name_of(layer): layer for layer in block.layers if layer.name in needs.diagonals}
        self._layers = {name_of(layer): layer for layer in block.layers if layer.name in needs.blocks}
        parts = {name: [layer_part(layer)] for name, layer in diagonals.items()}
        self._squares = GradientSquares(parts, {name: each.parameter for name, each in diagonals.items()}, "position")
        # All of them from the start, so that several processes add up the same.
        self._squares.sums = {name: torch.zeros_like(layer.parameter) for name, layer in diagonals.items()}
        self._transposed = {name for name, layer in diagonals.items() if layer.transposed}
        self._blocks = {
            name: BlockAccumulator(layer.weight.shape, BLOCK_SIZE, torch.float32, layer.parameter.device)
            for name, layer in self._layers.items()
        }

    def add(self, passage: Passage) -> None:
        """Add what a passage shows."""
        self._squares.add(passage)
        for name, layer in self._layers.items():
            for gradients in sample_gradients(passage, name, [layer_part(layer)], layer.parameter):
                self._blocks[name].add(gradients.transpose(1, 2) if layer.transposed else gradients)

    def found(self, walk: BackwardWalk) -> dict[str, Tensor]:
        """By the weights' names; without those that nothing reached."""
        sums = {**self._squares.sums, **{name: blocks.total for name, blocks in self._blocks.items()}}
        for total in sums.values():
            walk.processes.add(total)
        return {
            name: walk.scale * (total.T if name in self._transposed else total)
            for name, total in sums.items()
            if bool(total.any())
        }


def name_of(layer: Layer) -> str:
    """What the weight of a layer is called."""
    return f"{layer.name}.weight"
