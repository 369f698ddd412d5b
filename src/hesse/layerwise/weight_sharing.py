"""FlexiGPT: replace a block by a scaled copy of another block, plus a low rank for each of its layers."""

from collections.abc import Collection

import torch
from torch import Tensor

from hesse.constraints import LowRank
from hesse.curvature import Gram
from hesse.errors import OptionError, naming
from hesse.estimation.calibrated import Layers
from hesse.layerwise.layer_solver import LayerProblem, LayerSolver
from hesse.layerwise.workspace import layer_bytes
from hesse.methods import METHODS, Options
from hesse.networks.network import Block, CheckpointNetwork, Layer


class SharedWeights:
    """Weights of blocks as functions of other blocks' weights: W_k ≈ s ⊙ W_j + LR, with one factor of s per output.

    s is the scale with which W_j's outputs are nearest to W_k's on the layer's inputs (the paper renormalises the
    donor's outputs), and LR the best low rank for the rest, in the metric of these inputs (there the SVD of the
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
        """Return the kept block whose layers, scaled by outputs, are nearest to those of `block`.

        Raises:
            OptionError: none of them has layers of the same shapes.
        """
        shapes = [layer.weight.shape for layer in block.layers]
        alike = [k for k in kept if [x.weight.shape for x in self.network.blocks[k].layers] == shapes]
        if not alike:
            raise OptionError(f"no block that stays has layers of the shapes of {block.name}: leave out --share-rank")
        errors = dict.fromkeys(alike, 0.0)
        for number, layer in enumerate(block.layers):
            target = self._weight(layer)
            for k in alike:
                scaled = _scaled(self._weight(self.network.blocks[k].layers[number]), target, None)
                errors[k] += float((target - scaled).square().sum() / target.square().sum())
        return min(errors, key=errors.__getitem__)

    def share_block(
        self, block: Block, layers: Layers, donor: Block | None, solver: LayerSolver
    ) -> tuple[dict[str, Tensor], float | None]:
        """Make a block of the block `donor`; return its new weights as the files hold them, and its relative error.

        `layers` have the statistics "inputs" in the changed model, so that the block is made for what the blocks before
        it give. A block without a donor has no new weights.
        """
        weights, errors = dict[str, Tensor](), list[tuple[float, float]]()
        twins = {} if donor is None else dict(zip(block.layers, donor.layers, strict=True))
        for layer, statistics in layers:
            if layer not in twins:
                continue
            if not statistics.called:
                raise OptionError(f"{layer.name}: no sample reached it, so that it cannot be made of another layer")
            gram, target = statistics.gram, layer.weight.float()
            solution = self._solve(layer, self._weight(twins[layer]), gram, solver)
            stored = solution.to(self.network.tensors.dtype(f"{layer.name}.weight"))
            layer.replace(stored.to(solution))
            weights[f"{layer.name}.weight"] = (stored.T if layer.transposed else stored).contiguous().cpu()
            errors.append((gram.quadratic(stored.float() - target), gram.quadratic(target)))
        total = sum(error for error, _ in errors) / sum(whole for _, whole in errors) if errors else None
        return weights, total

    def workspace(self, layer: Layer) -> int:
        """Return the bytes that making a layer's weight of another holds at most."""
        shape = layer.weight.shape
        return 12 * shape.numel() + layer_bytes(self._rule, LowRank(self.rank), shape, {"inputs"}, 0)

    def parameters(self, block: Block) -> int:
        """Return how many numbers describe the layers of a block made of another: factors, and scales of outputs."""
        return sum(self.rank * sum(x.weight.shape) + x.weight.shape[0] for x in block.layers)

    def _solve(self, layer: Layer, other: Tensor, gram: Gram, solver: LayerSolver) -> Tensor:
        """Return the scaled weight `other` with the low rank that takes it nearest to the layer's weight."""
        target = layer.weight.float()
        scaled = _scaled(other, target, gram)
        problem = LayerProblem(layer.name, target - scaled, {"inputs": gram}, self._rule, LowRank(self.rank))
        return scaled + solver.solve(problem).solution.weight

    def _weight(self, layer: Layer) -> Tensor:
        """Return a layer's dense weight (out, in), from disk."""
        stored = self.network.tensors.read([f"{layer.name}.weight"])[f"{layer.name}.weight"].float()
        return (stored.T if layer.transposed else stored).to(self.network.device)


def _scaled(other: Tensor, wanted: Tensor, gram: Gram | None) -> Tensor:
    """Return the rows of `other` (out, in), each scaled to be nearest to that of `wanted` in the metric."""
    image = other if gram is None else gram.matvec(other)
    across, own = (wanted * image).sum(1, keepdim=True), (other * image).sum(1, keepdim=True)
    return other * torch.where(own > 0, across / own, 0)
