"""The feed-forward layer of a block: what makes its hidden units, what reads them, and what says how many."""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from hesse.errors import UnsupportedModelError
from hesse.models.architecture import build
from hesse.models.network import Block, Layer, Network

# What layers are called inside a block: those that make hidden units, and the one that reads them.
PARTS = (
    (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
    (("mlp.gate_up_proj",), "mlp.down_proj"),
    (("mlp.fc1",), "mlp.fc2"),
    (("fc1",), "fc2"),
    (("mlp.c_fc",), "mlp.c_proj"),
    (("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"),
    (("intermediate.dense",), "output.dense"),
    (("ffn.lin1",), "ffn.lin2"),
)
WIDTHS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "hidden_dim")


@dataclass(frozen=True, eq=False)
class FeedForward:
    """The layers that make the hidden units of a block, and the one that reads them."""

    makers: list[Layer]
    reader: Layer

    @property
    def width(self) -> int:
        """How many hidden units there are."""
        return self.reader.weight.shape[1]

    @classmethod
    def of(cls, block: Block) -> "FeedForward":
        """That of a block.

        Raises:
            UnsupportedModelError: the block has none, or several.
        """
        number = block.name.rpartition(".")[2]
        for ends, end in PARTS:
            makers = [_only(block, f".{number}.{name}") for name in ends]
            reader = _only(block, f".{number}.{end}")
            if reader is not None and None not in makers:
                return cls([maker for maker in makers if maker is not None], reader)
        raise UnsupportedModelError(
            f"{block.name} has no single feed-forward layer of a known shape, such as gate_proj, up_proj and "
            "down_proj: mixtures of experts cannot be made narrower here"
        )

    def rows(self, maker: Layer, units: Tensor) -> Tensor:
        """The outputs of a maker that `units` are made of: several each where gate and values are one layer."""
        whole = range(0, maker.weight.shape[0], self.width)
        return torch.cat([units + first for first in whole])


def width_setting(network: Network, parts: Sequence[FeedForward], width: int) -> str:
    """The setting of config.json that gives all feed-forward layers `width` hidden units, tried out without weights.

    Raises:
        UnsupportedModelError: there is none.
    """
    names = {module: name for name, module in network.model.named_modules()}
    for setting in WIDTHS:
        if not hasattr(network.model.config, setting):
            continue
        changed = copy(network.checkpoint)
        changed.config = {**network.checkpoint.config, setting: width}
        model = build(changed)
        found = [Layer(part.reader.name, model.get_submodule(names[part.reader.module])) for part in parts]
        if all(layer.weight.shape[1] == width for layer in found):
            return setting
    raise UnsupportedModelError(
        f"config.json of {type(network.model).__name__} has no setting for the width of all feed-forward layers: "
        f"{', '.join(WIDTHS)} were tried"
    )


def _only(block: Block, end: str) -> Layer | None:
    found = [layer for layer in block.layers if layer.name.endswith(end)]
    return found[0] if len(found) == 1 else None
