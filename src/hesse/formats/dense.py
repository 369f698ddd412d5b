"""Solved weights as ordinary dense tensors: larger than need be, and loaded by everything."""

from typing import Any

import torch
from torch import Tensor

from hesse.formats.base import Format


class DenseFormat(Format):
    """Weights in the checkpoint's own type; pruned ones as zeros, quantised ones as the values of their codes."""

    name = "dense"

    def as_stored(self, name: str, encoded: Any, weight: Tensor) -> Tensor:
        return weight.to(self.network.checkpoint.dtype(f"{name}.weight")).float()

    def tensors(self, name: str, encoded: Any, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        dtype = self.network.checkpoint.dtype(f"{name}.weight")
        stored = weight.T if self.layers[name].transposed else weight
        own = {f"{name}.weight": stored.to(dtype).contiguous()}
        return own if bias is None else {**own, f"{name}.bias": bias}

    def stored_bits(self, name: str) -> float:
        return torch.finfo(self.network.checkpoint.dtype(f"{name}.weight")).bits
