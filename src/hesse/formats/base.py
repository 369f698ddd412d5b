"""A format: how solved layers are stored so that other programs load them; the base stores ordinary tensors."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hesse.constraints import Constraint
from hesse.networks.families import is_expert
from hesse.networks.network import CheckpointNetwork


@dataclass(frozen=True, eq=False)
class StoredLayer:
    """A linear layer and the constraint its stored weight obeys."""

    name: str  # in the checkpoint, without ".weight"
    shape: torch.Size  # (out, in)
    constraint: Constraint | None  # None: unchanged
    transposed: bool  # the file holds (in, out)
    input_bits: int | None = None  # a loader rounds each token's inputs to this many bits; None: no rounding

    @property
    def is_expert(self) -> bool:
        """True if the layer is one matrix of one expert."""
        return is_expert(self.name)


class DenseFormat:
    """A way to store the layers of one network; here as weights in the checkpoint's type, which every program loads.

    Pruned weights are zeros, quantised weights the values of their codes: they save no space. Other formats extend it.

    Raises:
        OptionError: at construction, if no loader supports a layer; the message names the layer and an alternative.
    """

    name = "dense"

    def __init__(self, network: CheckpointNetwork, layers: list[StoredLayer]) -> None:
        self.network = network
        self.notes: list[str] = []
        self.layers = {layer.name: self._storable(layer) for layer in layers}

    def _storable(self, layer: StoredLayer) -> StoredLayer:
        """Return the layer with a constraint that this format can store, in the checkpoint's floating point type."""
        if layer.constraint is None:
            return layer
        return replace(layer, constraint=layer.constraint.stored_as(self.dtype(layer.name)))

    def dtype(self, name: str) -> torch.dtype:
        """Return the type of a layer's weight in the checkpoint."""
        return self.network.tensors.dtype(f"{name}.weight")

    def constraint(self, name: str) -> Constraint | None:
        """Return the constraint to solve the layer `name` under; None leaves the layer unchanged."""
        return self.layers[name].constraint

    def as_stored(self, name: str, encoded: Any, weight: Tensor) -> Tensor:
        """Return the float32 weight (out, in) that a reader gets for the code `encoded`, which decodes to `weight`."""
        return weight.to(self.dtype(name)).float()

    def tensors(self, name: str, encoded: Any, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        """Return all tensors to write for a solved layer, by full name.

        `encoded` is the constraint's code, `weight` (out, in) is its decoded value, `bias` is as it was read.
        """
        stored = weight.T if self.layers[name].transposed else weight
        tensors = {f"{name}.weight": stored.to(self.dtype(name)).contiguous()}
        return tensors if bias is None else {**tensors, f"{name}.bias": bias}

    def stands_alone(self, name: str) -> bool:
        """True if a layer is stored in tensors of its own where the checkpoint has it as a part of a larger one."""
        return False

    def stored(self, name: str) -> dict[str, Tensor]:
        """Return the tensors that `tensors` would return for a layer without a bias, on the meta device."""
        layer = self.layers[name]
        shape = layer.shape[::-1] if layer.transposed else layer.shape
        return {f"{name}.weight": torch.empty(shape, dtype=self.dtype(name), device="meta")}

    def config(self) -> dict[str, Any]:
        """Return the content of config.json."""
        return dict(self.network.checkpoint.config)

    def files(self) -> dict[str, str]:
        """Return the other text files that a loader needs, by name."""
        return {}

    def stored_bits(self, name: str) -> float:
        """Return the bits on disk per weight of a solved layer, with its scales, zero points and shapes."""
        return 8 * sum(tensor.nbytes for tensor in self.stored(name).values()) / self.layers[name].shape.numel()
