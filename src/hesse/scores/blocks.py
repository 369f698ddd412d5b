"""What a model loses with each of its blocks: measured, or said by its hidden states or its gradient."""

from collections.abc import Collection, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from hesse.checkpoints.tensor_store import StoredTensor, TensorStore
from hesse.estimation.probe import forward_walk
from hesse.evaluation.measure import Difference, branch
from hesse.evaluation.measurements import MeasuredMean
from hesse.networks.network import Network
from hesse.passes.backward import BackwardPass
from hesse.passes.stream import StreamBatch, advance, finish, start
from hesse.progress import Clock, Progress


class Removals:
    """The same samples through a network with and without blocks; what the whole one predicts of them waits on disk.

    `batches` are token ids (samples, tokens), and hidden states wait below `folder`. Losses are KL(whole || without) in
    nats per token, or half the squared error of an encoder's hidden states.
    """

    def __init__(self, network: Network, batches: list[Tensor], folder: Path, progress: Progress) -> None:
        self.network, self._batches, self._folder, self._progress = network, batches, folder, progress
        progress.begin("dense model", len(network.blocks))
        self.whole = start(network, batches, TensorStore(folder, "whole"))
        self.inputs = forward_walk(network, self.whole, self.whole, Clock(), progress.advance)

    def without(self, kept: Collection[int], candidates: Sequence[int]) -> dict[int, MeasuredMean]:
        """The loss of the `kept` blocks without each one of the `candidates`, in one walk: n²/2 runs of a block."""
        self._progress.begin("remove blocks", len(kept) + 1)
        base = start(self.network, self._batches, TensorStore(self._folder, f"kept-{len(kept)}"))
        walks: dict[int, list[StreamBatch]] = {}
        for index in sorted(kept):
            with self.network.loaded(self.network.blocks[index]) as module:
                for flows in walks.values():
                    advance(flows, module, index)
                if index in candidates:
                    walks[index] = branch(base)
                advance(base, module, index)
            self._progress.advance()
        differences = self.compared(walks)
        self._progress.advance()
        return differences

    def compared(self, walks: dict[int, list[StreamBatch]]) -> dict[int, MeasuredMean]:
        """How far flows that have passed all their blocks are from the whole model's."""
        found = {key: Difference(self.network.kind == "encoder") for key in walks}
        with self.network.surroundings() as model, torch.no_grad():
            for number, flow in enumerate(self.whole):
                wanted = finish(self.network, model, flow)
                for key, flows in walks.items():
                    found[key].add(finish(self.network, model, flows[number]), flow.ids, wanted)
        return {key: difference.measured() for key, difference in found.items()}

    def turns(self) -> list[float]:
        """How much each block turns the hidden states: 1 - the mean cosine of what enters and what leaves it.

        Source: the block influence of ShortGPT (Men et al., 2024); FlexiGPT (Smith et al., 2025) ranks so too.
        """
        found = []
        for before, after in self._sides():
            pairs = [(x.tensor().float(), y.tensor().float()) for x, y in zip(before, after, strict=True)]
            cosines = torch.cat([torch.cosine_similarity(x, y, dim=-1).flatten() for x, y in pairs])
            found.append(1 - float(cosines.double().mean()))
        return found

    def quadratic(self, seed: int) -> list[float]:
        """½ E[(gᵀd)²] of each block's own part d of the hidden states, in nats per token.

        g is the gradient of a sample's summed loss at a position of the block's output, labels being sampled from the
        model: the true Fisher, per position, of taking the block away.
        """
        found = [0.0] * len(self.network.blocks)
        shelf = TensorStore(self._folder, "gradient")
        self._progress.begin("walk back", len(found))
        walk = BackwardPass(self.network, self.whole, self.inputs, seed, shelf=shelf)
        sides = list(self._sides())
        for block, _ in walk:
            index = self.network.blocks.index(block)
            for before, after, slope in zip(*sides[index], walk.state.gradients, strict=True):
                along = (slope.tensor().double() * (after.tensor() - before.tensor()).double()).sum(-1)
                found[index] += 0.5 * walk.scale * float(along.square().sum())
            self._progress.advance()
        return found

    def _sides(self) -> list[tuple[list[StoredTensor], list[StoredTensor]]]:
        """What enters and what leaves each block, one a flow."""
        ends = [*self.inputs, [flow.waiting for flow in self.whole]]
        return list(pairwise(ends))
