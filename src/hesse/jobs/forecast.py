"""Forecast of a run: bytes of OUT, disk, memory and time."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hesse.data import Samples
from hesse.errors import HesseError
from hesse.estimation.calibrated import LayerStatistics, calibrated_blocks
from hesse.jobs.memory import parameters
from hesse.networks.network import CheckpointNetwork, Layer
from hesse.passes.stream import StreamBatch, advance, calibration_batch, start

BACKWARD = 4  # forward passes that a backward pass takes: the block again, gradients of inputs and outputs, factors

Solve = Callable[[Layer, LayerStatistics], object]


@dataclass(frozen=True)
class Work:
    """Work of a run that takes time: tokens that pass each block, bytes, and layers to solve."""

    forward: int = 0
    calibrated: int = 0  # with a stop and a Gram at each layer
    backward: int = 0
    bytes: int = 0  # read from disk and written
    layers: Mapping[str, torch.Size] = field(default_factory=dict)  # to solve, by name


def seconds_of(
    work: Work, network: CheckpointNetwork, samples: Samples, batch_size: int | None, solve: Solve | None = None
) -> tuple[float, list[str]]:
    """Return the seconds that `work` takes, from timing one block of `network` on a batch of the samples, and notes.

    `solve` solves a layer of the loaded block; it is timed for one layer of each shape.
    """
    size = batch_size or calibration_batch(samples.longest)
    batches = start(network, samples.batches(size)[:1])
    index = len(network.blocks) // 2  # most blocks are of its kind
    block, tokens, hidden = network.blocks[index], batches[0].ids.numel(), batches[0].hidden
    begun = time.perf_counter()
    with network.loaded(block) as module:
        read = time.perf_counter() - begun
        _forward(batches[0], module, index, hidden)  # compiles and fills caches
        begun = time.perf_counter()
        _forward(batches[0], module, index, hidden)
        forward = time.perf_counter() - begun
    batches[0].hidden = hidden
    needs = {layer.name: ("inputs",) for layer in block.layers}
    solving, notes = dict[torch.Size, float](), list[str]()
    begun = time.perf_counter()
    for _, layers in calibrated_blocks(network, batches, needs, first=index):
        for layer, statistics in layers:
            shape = layer.weight.shape
            if solve is not None and layer.name in work.layers and shape not in solving and statistics.called:
                before = time.perf_counter()
                try:
                    solve(layer, statistics)
                except HesseError as error:
                    notes.append(f"the time to solve {tuple(shape)} is not known: {error}")
                solving[shape] = time.perf_counter() - before
        calibrated = time.perf_counter() - begun - sum(solving.values()) - read
        break
    share = parameters(block) / sum(parameter.numel() for parameter in network.model.parameters())
    stored = share * network.checkpoint.file_bytes
    total = (work.forward + BACKWARD * work.backward) * forward / tokens
    total += work.calibrated * max(calibrated, forward) / tokens + work.bytes * read / max(stored, 1)
    return total + sum(_of_shape(shape, solving) for shape in work.layers.values()), notes


def _forward(batch: StreamBatch, module: nn.Module, index: int, hidden: Tensor) -> None:
    batch.hidden = hidden
    advance([batch], module, index)


def _of_shape(shape: torch.Size, solving: Mapping[torch.Size, float]) -> float:
    """Return the seconds for a layer, from one of its own shape or of the nearest cost, rows · columns²."""
    if not solving:
        return 0.0
    costs = {other: other[0] * other[1] ** 2 for other in solving}
    own = shape[0] * shape[1] ** 2
    nearest = min(costs, key=lambda other: (other != shape, abs(costs[other] - own)))
    return solving[nearest] * own / costs[nearest]


def tokens_of(samples: Samples) -> int:
    """Return the number of tokens of all samples."""
    return sum(len(ids) for ids in samples.ids)


def hidden_bytes(network: CheckpointNetwork, tokens: int) -> int:
    """Return the bytes of the hidden states of `tokens` tokens between two blocks."""
    width = int(network.model.config.get_text_config().hidden_size)
    return tokens * width * network.dtype.itemsize
