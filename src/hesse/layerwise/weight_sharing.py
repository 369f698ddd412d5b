"""FlexiGPT: a block that goes is made of one that stays, scaled, and a low rank beside each of its layers."""

from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from hesse.checkpoints.tensor_store import TensorStore
from hesse.constraints import LowRank
from hesse.curvature import Gram
from hesse.errors import OptionError, naming
from hesse.estimation.calibrated import calibrated_blocks
from hesse.layerwise.layer_solver import LayerProblem, LayerSolver
from hesse.methods import METHODS, Options
from hesse.networks.network import Block, CheckpointNetwork, Layer
from hesse.passes.stream import start
from hesse.progress import Progress


class StandIns:
    """Makes the weights of blocks from those of others: W_k ≈ s ⊙ W_j + LR, s one factor an output.

    s is the scale with which W_j's outputs are nearest to W_k's on the layer's inputs (the paper renormalises the
    stand-in's outputs), and LR the best low rank for what is left, in the metric of these inputs (there the SVD of the
    difference). Norms and biases stay the block's own. Source: FlexiGPT (Smith et al., 2025), before its fine-tuning.

    Raises:
        OptionError: the rank is too high for a layer.
    """

    def __init__(self, network: CheckpointNetwork, rank: int) -> None:
        self.network, self.rank = network, rank
        for layer in network.layers:
            with naming(layer.name):
                LowRank(rank).check(layer.weight.shape)
        self._rule = METHODS["activation-svd"].recipe(Options(rank=rank)).rules[0]

    def donor(self, block: Block, kept: Collection[int]) -> int:
        """The kept block whose layers, scaled by outputs, are nearest to those of `block`.

        Raises:
            OptionError: none of them has layers of the same shapes.
        """
        shapes = [layer.weight.shape for layer in block.layers]
        alike = [k for k in kept if [x.weight.shape for x in self.network.blocks[k].layers] == shapes]
        if not alike:
            raise OptionError(f"no block that stays has layers of the shapes of {block.name}: leave out --share-rank")
        left = dict.fromkeys(alike, 0.0)
        for number, layer in enumerate(block.layers):
            wanted = self._weight(layer)
            for k in alike:
                scaled = _scaled(self._weight(self.network.blocks[k].layers[number]), wanted, None)
                left[k] += float((wanted - scaled).square().sum() / wanted.square().sum())
        return min(left, key=left.__getitem__)

    def replace(
        self, donors: dict[int, int], batches: list[Tensor], folder: Path, progress: Progress
    ) -> tuple[dict[str, Tensor], dict[int, float]]:
        """The new weights as the files hold them, by name, and each block's relative error; `donors` by block.

        Samples go through the changed model, so that each stand-in sees what those before it make of them.
        """
        weights, errors = dict[str, Tensor](), dict[int, float]()
        solver, flows = LayerSolver(), start(self.network, batches, TensorStore(folder, "stand-ins"))
        needs = {layer.name: ("inputs",) for index in donors for layer in self.network.blocks[index].layers}
        progress.begin("make stand-ins", len(self.network.blocks))
        for index, (block, layers) in enumerate(calibrated_blocks(self.network, flows, needs)):
            made: list[tuple[float, float]] = []
            donor = self.network.blocks[donors[index]] if index in donors else None
            twins = {} if donor is None else dict(zip(block.layers, donor.layers, strict=True))
            for layer, statistics in layers:
                if layer not in twins:
                    continue
                if not statistics.called:
                    raise OptionError(f"{layer.name}: no sample reached it, so that it cannot be made of another layer")
                gram, wanted = statistics.gram, layer.weight.float()
                solved = self._made(layer, self._weight(twins[layer]), gram, solver)
                stored = solved.to(self.network.checkpoint.dtype(f"{layer.name}.weight"))
                layer.replace(stored.to(solved))
                weights[f"{layer.name}.weight"] = (stored.T if layer.transposed else stored).contiguous().cpu()
                made.append((gram.quadratic(stored.float() - wanted), gram.quadratic(wanted)))
            if made:
                errors[index] = sum(error for error, _ in made) / sum(whole for _, whole in made)
            progress.advance()
        return weights, errors

    def parameters(self, block: Block) -> int:
        """How many numbers stand for the layers of a block that has a stand-in: factors, and scales of outputs."""
        return sum(self.rank * sum(x.weight.shape) + x.weight.shape[0] for x in block.layers)

    def _made(self, layer: Layer, other: Tensor, gram: Gram, solver: LayerSolver) -> Tensor:
        wanted = layer.weight.float()
        scaled = _scaled(other, wanted, gram)
        problem = LayerProblem(layer.name, wanted - scaled, {"inputs": gram}, self._rule, LowRank(self.rank))
        return scaled + solver.solve(problem).solution.weight

    def _weight(self, layer: Layer) -> Tensor:
        """A layer's dense weight (out, in), from disk."""
        stored = self.network.checkpoint.read([f"{layer.name}.weight"])[f"{layer.name}.weight"].float()
        return (stored.T if layer.transposed else stored).to(self.network.device)


def _scaled(other: Tensor, wanted: Tensor, gram: Gram | None) -> Tensor:
    """The rows of `other` (out, in), each by the factor that takes it nearest to that of `wanted` in the metric."""
    image = other if gram is None else gram.matvec(other)
    across, own = (wanted * image).sum(1, keepdim=True), (other * image).sum(1, keepdim=True)
    return other * torch.where(own > 0, across / own, 0)
