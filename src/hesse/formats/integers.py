"""The int-quantized layout of compressed-tensors: one byte per weight, for runtimes that also round inputs."""

import torch
from torch import Tensor

from hesse.errors import OptionError
from hesse.formats.base import StoredLayer
from hesse.formats.packed import PackedFormat
from hesse.networks.network import CheckpointNetwork


class IntegerFormat(PackedFormat):
    """Codes of 8 bits as int8, one scale per group in the checkpoint's type; unquantised layers are dense.

    Layers of fewer bits would take the same room, so they are refused.
    """

    name = "int-quantized"
    layout = "int-quantized"

    def __init__(self, network: CheckpointNetwork, layers: list[StoredLayer]) -> None:
        super().__init__(network, layers)
        for name in self.packed:
            if (bits := self.grid(name).bits) != 8:
                raise OptionError(f"{name}: {self.name} stores {bits} bits in a whole byte: use --format auto")

    def codes(self, name: str, codes: Tensor) -> dict[str, Tensor]:
        return {f"{name}.weight": codes.contiguous()}

    def stored_bits(self, name: str) -> float:
        if name not in self.packed:
            return super().stored_bits(name)
        groups = self.grid(name).groups(self.layers[name].shape[1]) / self.layers[name].shape[1]
        return 8 + groups * torch.finfo(self.grid(name).dtype).bits
