"""The Gram of a layer's inputs with positions weighted by the attention that they receive in the block."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from hesse.curvature import Gram
from hesse.errors import UnsupportedModelError
from hesse.estimation.statistics.base import STATISTICS, InputAccumulator, InputStatistic
from hesse.estimation.statistics.inputs import input_gram
from hesse.estimation.sums import GramAccumulator
from hesse.networks.attention import attention_received, tells_attention
from hesse.networks.families import is_expert
from hesse.networks.network import Block, Layer, Network
from hesse.passes.stream import StreamBatch
from hesse.processes import Processes

LEAST = 0.1  # weight of the position that receives least attention; the one that receives most has 1


class WeightedInputs(InputStatistic):
    """E[r xxᵀ] of a layer's inputs x with weights r of their positions, a Gram; None where these are not known."""

    name = "weighted inputs"
    missing = "how much attention its positions receive is not known; they were taken as equals"

    def bytes(self, shape: Sequence[int], samples: int) -> int:
        """Return 4 bytes for each pair of inputs."""
        return 4 * shape[1] ** 2

    def working_bytes(self, shape: Sequence[int], tokens: int, length: int) -> int:
        """Return those of the inputs times weights, and of the attention scores of one head."""
        return 4 * (shape[1] ** 2 + 2 * tokens * shape[1] + 3 * length**2)

    def check_network(self, network: Network, layers: Collection[str]) -> None:
        """Refuse a network whose attention cannot be observed."""
        if not tells_attention(network.model):
            raise UnsupportedModelError(
                f"the attention of {type(network.model).__name__} cannot be observed, but this method weighs inputs by "
                "the attention that their positions receive: use curvature gram, or another method"
            )

    def prepare(self, batches: Sequence[StreamBatch], block: Block, index: int) -> list[Tensor] | None:
        """Return the weights of each batch's positions."""
        return position_weights(batches, block, index)

    def accumulator(self, layer: Layer, prepared: Any) -> InputAccumulator | None:
        """Return an empty Gram; None without weights, and for experts, which get some positions only."""
        if prepared is None or is_expert(layer.name):
            return None
        return _WeightedInputs(input_gram(layer), prepared)


class _WeightedInputs:
    def __init__(self, gram: GramAccumulator, weights: list[Tensor]) -> None:
        self._gram, self._weights, self._known = gram, weights, True

    def add(self, rows: Tensor, batch: int) -> None:
        flat, weights = rows.reshape(-1, rows.shape[-1]), self._weights[batch].flatten()
        self._known = self._known and len(flat) == len(weights)
        if self._known:
            self._gram.add(flat.float() * weights.sqrt()[:, None])

    def value(self, processes: Processes) -> Gram | None:
        return self._gram.gram(processes) if self._known else None


def position_weights(batches: Sequence[StreamBatch], block: Block, index: int) -> list[Tensor] | None:
    """Return the weights (samples, tokens) of each batch's positions in a block; None if it has no attention.

    A sample's weights lie between LEAST and 1, linear in the attention that its positions receive. Source: RSQ (Sung et
    al., 2025), whose best choice of weights this is.
    """
    weights: list[Tensor] = []
    with torch.no_grad():
        for batch in batches:
            with attention_received(block.module) as attention:
                batch.run(block.module, index)
            if not attention:
                return None
            weights.append(in_range(torch.stack(attention).sum(0)))
    return weights


def in_range(attention: Tensor) -> Tensor:
    """Map `attention` (samples, tokens) linearly to [LEAST, 1] in each sample; 1 where all receive the same."""
    least, most = attention.amin(1, keepdim=True), attention.amax(1, keepdim=True)
    share = torch.where(most > least, (attention - least) / (most - least), 1.0)
    return LEAST + (1 - LEAST) * share


STATISTICS.register(WeightedInputs.name, WeightedInputs())
