"""Feed-forward layers of a block: the layers that write and read hidden units, and the settings of their width."""

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
from hesse.networks.sources import Names


@dataclass(frozen=True, eq=False)
class FeedForward:
    """The layers that write some hidden units of a block, and the layer that reads them."""

    writers: list[Layer]
    reader: Layer

    @property
    def width(self) -> int:
        """Return the number of hidden units."""
        return self.reader.weight.shape[1]

    def rows(self, writer: Layer, units: Tensor) -> Tensor:
        """Return the rows of a writer that produce `units`: several per unit if gate and values are one layer."""
        starts = range(0, writer.weight.shape[0], self.width)
        return torch.cat([units + first for first in starts])


def feed_forwards(block: Block) -> list[FeedForward]:
    """Return the feed-forward layers of a block: one, or one per expert.

    Raises:
        UnsupportedModelError: the block has none of a known shape.
    """
    number, layers = block.name.rpartition(".")[2], list[FeedForward]()
    shapes = [
        *((f".{down}", (gate, up), down) for gate, up, down in EXPERT_LAYERS),
        *((f".{number}.{reader}", writers, reader) for writers, reader in FEED_FORWARD_LAYERS),
    ]
    named = {layer.name: layer for layer in block.layers}
    for name, layer in named.items():
        for ending, writers, reader in shapes:
            names = [name.removesuffix(reader) + writer for writer in writers]
            if name.endswith(ending) and all(writer in named for writer in names):
                layers.append(FeedForward([named[writer] for writer in names], layer))
    if not layers:
        raise UnsupportedModelError(
            f"{block.name} has no feed-forward layer of a known shape, such as gate_proj, up_proj and down_proj"
        )
    return layers


def width_settings(
    network: CheckpointNetwork, parts: Sequence[FeedForward], new_widths: Mapping[int, int]
) -> dict[str, int]:
    """Return the settings of config.json that change the width of every feed-forward layer as `new_widths` maps it.

    Each candidate is tried on a model without weights.

    Raises:
        UnsupportedModelError: no such settings exist.
    """
    names = {module: name for name, module in network.model.named_modules()}
    settings: dict[str, int] = {}
    for setting in (each for each in CONFIG_WIDTHS if hasattr(network.model.config, each)):
        for before, after in new_widths.items():
            widths = _widths(network, {**settings, setting: after}, [names[part.reader.module] for part in parts])
            changed = [(part.width, now) for part, now in zip(parts, widths, strict=True) if now != part.width]
            if (before, after) in changed and all(now == new_widths[was] for was, now in changed):
                settings[setting] = after
                if len(changed) == len(parts):
                    return settings
                break
    raise UnsupportedModelError(
        f"config.json of {type(network.model).__name__} has no settings for the width of all feed-forward layers: "
        f"{', '.join(CONFIG_WIDTHS)} were tried"
    )


def _widths(network: CheckpointNetwork, settings: Mapping[str, int], readers: Sequence[str]) -> list[int]:
    """Return the widths of feed-forward layers in a model with other settings; `readers` are the readers' names."""
    changed = copy(network.checkpoint)
    changed.config = {**network.checkpoint.config, **settings}
    try:
        model = build(changed)
        unfuse(model, Names(model).expert_names)
    except UnsupportedModelError:  # settings that contradict each other
        return [-1 for _ in readers]
    return [Layer(name, model.get_submodule(name)).weight.shape[1] for name in readers]
