"""Dense format: solved weights as ordinary tensors, which every program loads but which save no space."""

from typing import Any

import torch
from torch import Tensor

from hesse.formats.base import Format


class DenseFormat(Format):
    """Weights in the checkpoint's type: pruned weights are zeros, quantised weights the values of their codes."""

    name = "dense"

    def as_stored(self, name: str, encoded: Any, weight: Tensor) -> Tensor:
        return weight.to(self.network.checkpoint.dtype(f"{name}.weight")).float()

    def tensors(self, name: str, encoded: Any, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        dtype = self.network.checkpoint.dtype(f"{name}.weight")
        stored = weight.T if self.layers[name].transposed else weight
        tensors = {f"{name}.weight": stored.to(dtype).contiguous()}
        return tensors if bias is None else {**tensors, f"{name}.bias": bias}

    def stored_bits(self, name: str) -> float:
        return torch.finfo(self.network.checkpoint.dtype(f"{name}.weight")).bits
