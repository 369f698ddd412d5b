"""Scores of a model's blocks: measured, by the cosine of hidden states, or by the gradient of the loss."""

from collections.abc import Collection, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from hesse.checkpoints.tensor_store import TensorStore
from hesse.estimation.probe import forward_walk
from hesse.evaluation.measure import branch
from hesse.evaluation.measurements import MeasuredMean
from hesse.evaluation.metrics import totals_of
from hesse.networks.network import Block, Network, each_loaded
from hesse.partitions import ParameterSets, Partition
from hesse.passes.backward import BackwardPass
from hesse.passes.block_state import BlockState
from hesse.passes.stream import StreamBatch, advance, finish, start
from hesse.progress import Clock, Progress
from hesse.scores.score import BLOCKS, register_score


class Removals:
    """The same samples through a network with and without blocks: the evidence that scores of blocks judge by.

    `batches` are token ids (samples, tokens); hidden states are kept on disk below `folder`. Losses are
    KL(whole || without) in nats per token, or half the squared error of an encoder's hidden states. `seed` is that of
    sampled labels.
    """

    def __init__(
        self, network: Network, batches: list[Tensor], folder: Path, progress: Progress, seed: int = 0
    ) -> None:
        self.network, self._batches, self._folder, self._progress = network, batches, folder, progress
        self.seed = seed
        progress.begin("dense model", len(network.blocks))
        self.whole = start(network, batches, TensorStore(folder, "whole"))
        self.inputs = forward_walk(network, self.whole, self.whole, Clock(), progress.advance)

    @property
    def partition(self) -> ParameterSets:
        """The blocks of the network as a partition of their parameters."""
        blocks = [
            {f"{block.name}.{name}": parameter.shape for name, parameter in block.module.named_parameters()}
            for block in self.network.blocks
        ]
        shapes = {name: shape for block in blocks for name, shape in block.items()}
        return ParameterSets(shapes, [list(block) for block in blocks])

    def measured(self, partition: Partition) -> Tensor:
        """Return the loss without each block alone (blocks,)."""
        every = range(partition.count)
        differences = self.without(every, every)
        return torch.tensor([differences[number].value for number in every], dtype=torch.float64)

    def without(self, kept: Collection[int], candidates: Sequence[int]) -> dict[int, MeasuredMean]:
        """Return the loss of the `kept` blocks without each of the `candidates`, in one pass: n²/2 runs of a block."""
        self._progress.begin("remove blocks", len(kept) + 1)
        base = start(self.network, self._batches, TensorStore(self._folder, f"kept-{len(kept)}"))
        walks: dict[int, list[StreamBatch]] = {}
        for index, block in each_loaded(self.network, sorted(kept)):
            for flows in walks.values():
                advance(flows, block.module, index)
            if index in candidates:
                walks[index] = branch(base)
            advance(base, block.module, index)
            self._progress.advance()
        differences = self.compared(walks)
        self._progress.advance()
        return differences

    def compared(self, walks: dict[int, list[StreamBatch]]) -> dict[int, MeasuredMean]:
        """Return how far batches that have passed all their blocks are from the whole model's."""
        found = {key: totals_of(self.network) for key in walks}
        with self.network.surroundings() as model, torch.no_grad():
            for number, flow in enumerate(self.whole):
                wanted = finish(self.network, model, flow)
                for key, flows in walks.items():
                    found[key].add(finish(self.network, model, flows[number]), flow.targets, wanted)
        return {key: difference.mean_divergence() for key, difference in found.items()}

    def backward(self) -> Iterator[tuple[Block, BackwardPass]]:
        """Walk back through the blocks; the gradients at the output of each are in the state of the walk."""
        self._progress.begin("walk back", len(self.network.blocks))
        gradients = TensorStore(self._folder, "gradient")
        walk = BackwardPass(self.network, self.whole, self.inputs, self.seed, shelf=gradients)
        for block, _ in walk:
            yield block, walk
            self._progress.advance()

    def sides(self) -> list[tuple[list[BlockState], list[BlockState]]]:
        """Return the hidden states that enter and leave each block, one of each a batch."""
        ends = [*self.inputs, [flow.waiting for flow in self.whole]]
        return list(pairwise(ends))


@register_score("cosine", source="the block influence of ShortGPT, Men et al., 2024, arXiv:2403.03853", parts=BLOCKS)
def cosine(evidence: Removals, partition: Partition) -> Tensor:
    """1 - the mean cosine of the hidden states that enter and leave a block.

    FlexiGPT (Smith et al., 2025) ranks blocks so too.
    """
    found = []
    for before, after in evidence.sides():
        pairs = [(x.tensor().float(), y.tensor().float()) for x, y in zip(before, after, strict=True)]
        cosines = torch.cat([torch.cosine_similarity(x, y, dim=-1).flatten() for x, y in pairs])
        found.append(1 - float(cosines.double().mean()))
    return torch.tensor(found, dtype=torch.float64)


@register_score("quadratic", source="the true Fisher, per position, of a removal", parts=BLOCKS, nats=True)
def quadratic(evidence: Removals, partition: Partition) -> Tensor:
    """½ E[(gᵀd)²] of each block's own part d of the hidden states, in nats per token.

    g is the gradient of a sample's summed loss at a position of the block's output, labels being sampled from the
    model: the true Fisher, per position, of a removal of the block.
    """
    network, sides = evidence.network, evidence.sides()
    found = [0.0] * len(network.blocks)
    for block, walk in evidence.backward():
        index = network.blocks.index(block)
        for before, after, slope in zip(*sides[index], walk.state.gradients, strict=True):
            along = (slope.tensor().double() * (after.tensor() - before.tensor()).double()).sum(-1)
            found[index] += 0.5 * walk.scale * float(along.square().sum())
    return torch.tensor(found, dtype=torch.float64)
