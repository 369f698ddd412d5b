"""A dense model and a compressed one that was made of it, layer by layer."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hesse.checkpoints.checkpoint import Checkpoint
from hesse.constraints import LowRank
from hesse.errors import OptionError, naming
from hesse.formats import open_checkpoint, open_networks
from hesse.layerwise.rules import check_patterns
from hesse.methods.patterns import matches
from hesse.networks.layout import vocabulary
from hesse.networks.network import CheckpointNetwork, Layer


@dataclass(frozen=True, eq=False)
class Pair:
    """A dense model and one that was made of it, whose layers go together."""

    source: Checkpoint  # the dense one's
    dense: CheckpointNetwork  # in float32
    probed: CheckpointNetwork  # the same modules, in the type that calibration runs in
    network: CheckpointNetwork  # the compressed model's, in that type
    twins: dict[str, str]  # a layer's name in the dense checkpoint, by its name in the compressed one
    layers: list[Layer]  # of the compressed model, to be repaired

    @classmethod
    def open(cls, dense: Path, compressed: Path, rank: int, ignore: tuple[str, ...], device: torch.device) -> "Pair":
        """Both models, every layer that is not ignored to get factors of so high a rank.

        Raises:
            HesseError: one cannot be read, they do not belong together, or a rank or pattern does not fit.
        """
        if dense.resolve() == compressed.resolve():
            raise OptionError(f"{dense} is both the dense and the compressed model: give the two")
        source, network, probed = open_networks(dense, device)
        other = CheckpointNetwork(open_checkpoint(compressed), probed.dtype, device)
        for each in (network, other):
            each.check_layers_stored()
        pairs = _paired(network, other, dense, compressed)
        known = (name for name, _ in other.model.named_modules())
        check_patterns((layer.name for layer in other.layers), known, ignore)
        layers = [x for x in other.layers if not any(matches(x.name, pattern) for pattern in ignore)]
        if not layers:
            raise OptionError("no layer is left to repair: leave out an --ignore")
        for layer in layers:
            with naming(layer.name):
                LowRank(rank).check(layer.weight.shape)
        return cls(source, network, probed, other, pairs, layers)

    def weights(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """The dense weight and the compressed one of a layer of the compressed model, both (out, in) in float32.

        Raises:
            OptionError: the second is no approximation of the first.
        """
        read = ((self.source, self.twins[layer.name]), (self.network.tensors, layer.name))
        stored = [checkpoint.read([f"{name}.weight"])[f"{name}.weight"] for checkpoint, name in read]
        wanted, present = ((x.T if layer.transposed else x).to(self.network.device).float() for x in stored)
        if not (wanted - present).square().sum() <= wanted.square().sum():
            raise OptionError(
                f"{layer.name}: the compressed weight is farther from the dense one than zero is: it is not of this "
                "model, or scales or rotations were moved between layers, which no low rank beside a layer can follow"
            )
        return wanted, present

    def dtype(self, layer: str) -> torch.dtype:
        """The type that the dense checkpoint stores a layer of the compressed model in."""
        return self.source.dtype(f"{self.twins[layer]}.weight")


def _paired(network: CheckpointNetwork, other: CheckpointNetwork, dense: Path, compressed: Path) -> dict[str, str]:
    """The dense checkpoint's name of each layer of the compressed one.

    Raises:
        OptionError: they differ in architecture, layers, shapes or vocabulary.
    """
    first, second = type(network.model).__name__, type(other.model).__name__
    if first != second:
        raise OptionError(f"{dense} is a {first} and {compressed} a {second}: give the model that was compressed")
    if vocabulary(network.model) != vocabulary(other.model) or len(network.layers) != len(other.layers):
        raise OptionError(f"{dense} and {compressed} have different vocabularies or numbers of layers")
    pairs = list(zip(network.layers, other.layers, strict=True))
    for own, twin in pairs:
        if own.weight.shape != twin.weight.shape:
            shapes = f"{tuple(own.weight.shape)} in {dense} and {tuple(twin.weight.shape)} in {compressed}"
            raise OptionError(f"{twin.name} has shape {shapes}: give the model that was compressed")
    return {twin.name: own.name for own, twin in pairs}
