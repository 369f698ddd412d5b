"""Network over a transformers model in memory: the same blocks and layers as a checkpoint's, always loaded."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hesse.curvature import Objective
from hesse.networks.layout import input_limit, kind_of
from hesse.networks.network import Block, Blocks, Layer, Network, list_blocks


class ModuleNetwork(Network):
    """Transformers model in memory as a network; `layers` are the layers that calibration stops at.

    Raises:
        UnsupportedModelError: the model is not a list of blocks of linear layers.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[Layer]) -> None:
        self.model, self.kind = model, kind_of(model)
        weight = next(model.parameters())
        self.dtype, self.device = weight.dtype, weight.device
        # Not inference mode: the model remains the user's, and may keep tensors that it computes.
        self.gradients_off = torch.no_grad
        self.blocks = list_blocks(model, partial(_block, layers))

    @property
    def input_limit(self) -> int | None:
        """Return the largest number of tokens of a sample; None without a limit."""
        return input_limit(self.model, "the model's config")

    @contextmanager
    def loaded(self, block: Block) -> Iterator[nn.Module]:
        """Yield the block."""
        yield block.module

    @contextmanager
    def surroundings(self) -> Iterator[PreTrainedModel]:
        """Yield the model."""
        yield self.model


class SingleBlock(Blocks):
    """Any module in memory as a network of one block."""

    def __init__(self, model: nn.Module, layers: Sequence[Layer]) -> None:
        self.model, self.blocks = model, [Block(type(model).__name__, model, tuple(layers))]
        self.gradients_off = torch.no_grad

    @contextmanager
    def loaded(self, block: Block) -> Iterator[nn.Module]:
        """Yield the module."""
        yield block.module


def _block(layers: Sequence[Layer], name: str, module: nn.Module) -> Block:
    inside = set(module.modules())
    return Block(name, module, tuple(layer for layer in layers if layer.module in inside))


@dataclass(frozen=True, eq=False)
class ModuleBatch:
    """The inputs of one batch of an objective's data, which pass a network of one block."""

    objective: Objective
    inputs: Any

    def pass_block(self, module: nn.Module, index: int) -> None:
        """Run the objective's model on the inputs."""
        self.objective.outputs_once(self.inputs)

    def arguments(self, index: int) -> Any:
        """Return the inputs."""
        return self.inputs
