"""The protocol of a format: how solved layers are stored so that other programs load them."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hesse.constraints import Constraint
from hesse.networks.families import is_expert
from hesse.networks.network import Network


@dataclass(frozen=True, eq=False)
class StoredLayer:
    """A linear layer and what is to become of it."""

    name: str  # in the checkpoint, without ".weight"
    shape: torch.Size  # (out, in)
    constraint: Constraint | None  # None: left as it is
    transposed: bool  # the file holds (in, out)
    input_bits: int | None = None  # that a loader rounds each token's inputs to; None: it does not

    @property
    def is_expert(self) -> bool:
        """Whether it is one matrix of one expert."""
        return is_expert(self.name)


class Format(ABC):
    """A way to store the layers of one network.

    Raises:
        OptionError: at construction, where no loader can take what is asked; the message names the layer and what would
            work.
    """

    name: str

    def __init__(self, network: Network, layers: list[StoredLayer]) -> None:
        self.network = network
        self.notes: list[str] = []
        self.layers = {layer.name: self._adapted(layer) for layer in layers}

    def _adapted(self, layer: StoredLayer) -> StoredLayer:
        """The layer with its constraint as this format can store it, in the checkpoint's own floating point type."""
        if layer.constraint is None:
            return layer
        dtype = self.network.checkpoint.dtype(f"{layer.name}.weight")
        return replace(layer, constraint=layer.constraint.stored_as(dtype))

    def constraint(self, name: str) -> Constraint | None:
        """The constraint to solve for the layer `name`; None to leave it as it is."""
        return self.layers[name].constraint

    def as_stored(self, name: str, encoded: Any, weight: Tensor) -> Tensor:
        """What reading back gives for a layer solved as `encoded`, which decodes to `weight` (out, in); in float32."""
        return weight

    @abstractmethod
    def tensors(self, name: str, encoded: Any, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        """All tensors to write for a solved layer, by full name.

        `encoded` is the constraint's stored form, `weight` (out, in) what it decodes to, `bias` as it was read.
        """

    def config(self) -> dict[str, Any]:
        """The config.json to write."""
        return dict(self.network.checkpoint.config)

    def files(self) -> dict[str, str]:
        """Other text files that a loader needs, by name."""
        return {}

    @abstractmethod
    def stored_bits(self, name: str) -> float:
        """Bits on disk per weight of a solved layer, scales, zero points and the like included."""
