"""The feed-forward layers of a block: what makes their hidden units, what reads them, and what says how many."""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from hesse.errors import UnsupportedModelError
from hesse.networks.architecture import build
from hesse.networks.experts import unfuse
from hesse.networks.families import CONFIG_WIDTHS, EXPERT_LAYERS, FEED_FORWARD_LAYERS
from hesse.networks.network import Block, CheckpointNetwork, Layer


@dataclass(frozen=True, eq=False)
class FeedForward:
    """The layers that make some hidden units of a block, and the one that reads them."""

    makers: list[Layer]
    reader: Layer

    @property
    def width(self) -> int:
        """How many hidden units there are."""
        return self.reader.weight.shape[1]

    def rows(self, maker: Layer, units: Tensor) -> Tensor:
        """The outputs of a maker that `units` are made of: several each where gate and values are one layer."""
        whole = range(0, maker.weight.shape[0], self.width)
        return torch.cat([units + first for first in whole])


def feed_forwards(block: Block) -> list[FeedForward]:
    """Those of a block: one, or those of its experts.

    Raises:
        UnsupportedModelError: there is none of a known shape.
    """
    number, found = block.name.rpartition(".")[2], list[FeedForward]()
    shapes = [
        *((f".{down}", (gate, up), down) for gate, up, down in EXPERT_LAYERS),
        *((f".{number}.{reader}", makers, reader) for makers, reader in FEED_FORWARD_LAYERS),
    ]
    named = {layer.name: layer for layer in block.layers}
    for name, layer in named.items():
        for ending, makers, reader in shapes:
            names = [name.removesuffix(reader) + maker for maker in makers]
            if name.endswith(ending) and all(maker in named for maker in names):
                found.append(FeedForward([named[maker] for maker in names], layer))
    if not found:
        raise UnsupportedModelError(
            f"{block.name} has no feed-forward layer of a known shape, such as gate_proj, up_proj and down_proj"
        )
    return found


def width_settings(
    network: CheckpointNetwork, parts: Sequence[FeedForward], wanted: Mapping[int, int]
) -> dict[str, int]:
    """The settings of config.json that give every feed-forward layer the width that is `wanted` for its own.

    Each is tried out on a model without weights.

    Raises:
        UnsupportedModelError: there are none.
    """
    names = {module: name for name, module in network.model.named_modules()}
    found: dict[str, int] = {}
    for setting in (each for each in CONFIG_WIDTHS if hasattr(network.model.config, each)):
        for before, after in wanted.items():
            widths = _widths(network, {**found, setting: after}, [names[part.reader.module] for part in parts])
            changed = [(part.width, now) for part, now in zip(parts, widths, strict=True) if now != part.width]
            if (before, after) in changed and all(now == wanted[was] for was, now in changed):
                found[setting] = after
                if len(changed) == len(parts):
                    return found
                break
    raise UnsupportedModelError(
        f"config.json of {type(network.model).__name__} has no settings for the width of all feed-forward layers: "
        f"{', '.join(CONFIG_WIDTHS)} were tried"
    )


def _widths(network: CheckpointNetwork, settings: Mapping[str, int], readers: Sequence[str]) -> list[int]:
    """The widths of feed-forward layers, by the names of what reads them, in a model with other settings."""
    changed = copy(network.checkpoint)
    changed.config = {**network.checkpoint.config, **settings}
    try:
        model = build(changed)
    except UnsupportedModelError:  # settings that cannot be had together
        return [-1 for _ in readers]
    unfuse(model, set(network.checkpoint.names()))
    return [Layer(name, model.get_submodule(name)).weight.shape[1] for name in readers]
