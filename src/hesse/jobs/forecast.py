"""Forecast of a run: bytes of OUT, disk, memory and time."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from hesse.data import Samples
from hesse.errors import HesseError
from hesse.estimation.calibrated import LayerStatistics, calibrated_blocks
from hesse.jobs.job import Job
from hesse.jobs.memory import bound_of, parameters
from hesse.networks.network import CheckpointNetwork, Layer
from hesse.passes.block_calls import independent
from hesse.passes.block_state import BlockState
from hesse.passes.stream import StreamBatch, advance, calibration_batch, start
from hesse.result import ForecastReport

BACKWARD = 4  # forward passes that a backward pass takes: the block again, gradients of inputs and outputs, factors

Solve = Callable[[Layer, LayerStatistics], object]


@dataclass(frozen=True, kw_only=True)
class Work:
    """Work of a run, as far as it takes room, memory or time; tokens are those that pass the whole model."""

    after: int  # bytes of the model after the run, at most
    out: int | None = None  # bytes of OUT, if OUT is not the whole model
    disk: int  # free bytes that the run needs
    phases: Mapping[str, int]  # bytes of memory by what is done then; see `bound_of`
    forward: float = 0  # tokens
    calibrated: int = 0  # tokens, with a stop and a Gram at each layer
    backward: int = 0  # tokens
    bytes: int  # read from disk and written
    layers: Mapping[str, torch.Size] = field(default_factory=dict)  # to solve, by name
    solve: Solve | None = None  # solves a layer of a loaded block; timed for one layer of each shape
    notes: Sequence[str] = ()


def forecast(job: Job, network: CheckpointNetwork, samples: Samples, work: Work) -> ForecastReport:
    """Return the report of a dry run of `job` on `network`, whose time is estimated on one batch of the samples."""
    memory, phase = bound_of(work.phases)
    seconds, notes = _seconds(work, network, samples, job.calibration.batch_size)
    head = job.head(network.checkpoint.file_bytes, work.after, None)
    head |= {"seconds": {"total": seconds}, "notes": [*job.notes, *notes, *work.notes]}
    out = work.after if work.out is None else work.out
    return ForecastReport(**head, out_bytes=out, disk_bytes=work.disk, memory_bytes=memory, memory_phase=phase)


def _seconds(
    work: Work, network: CheckpointNetwork, samples: Samples, batch_size: int | None
) -> tuple[float, list[str]]:
    """Return the seconds that `work` takes, from timing one block of `network`, and notes."""
    size = batch_size or calibration_batch(samples.longest)
    batches = start(network, samples.batches(size)[:1])
    index = len(network.blocks) // 2  # most blocks are of its kind
    index = index if independent(batches[0].calls[index]) else 0
    block, tokens, state = network.blocks[index], batches[0].ids.numel(), batches[0].waiting
    begun = time.perf_counter()
    with network.loaded(block) as module:
        read = time.perf_counter() - begun
        _forward(batches[0], module, index, state)  # compiles and fills caches
        begun = time.perf_counter()
        _forward(batches[0], module, index, state)
        forward = time.perf_counter() - begun
    batches[0].waiting = state
    needs = {layer.name: ("inputs",) for layer in block.layers}
    solving, notes = dict[torch.Size, float](), list[str]()
    begun = time.perf_counter()
    for _, layers in calibrated_blocks(network, batches, needs, first=index):
        for layer, statistics in layers:
            shape = layer.weight.shape
            if work.solve is not None and layer.name in work.layers and shape not in solving and statistics.called:
                before = time.perf_counter()
                try:
                    work.solve(layer, statistics)
                except HesseError as error:
                    notes.append(f"the time to solve {tuple(shape)} is not known: {error}")
                solving[shape] = time.perf_counter() - before
        calibrated = time.perf_counter() - begun - sum(solving.values()) - read
        break
    share = parameters(block) / sum(parameter.numel() for parameter in network.model.parameters())
    stored = share * network.checkpoint.file_bytes
    passing = (work.forward + BACKWARD * work.backward) * forward + work.calibrated * max(calibrated, forward)
    total = len(network.blocks) * passing / tokens + work.bytes * read / max(stored, 1)
    return total + sum(_of_shape(shape, solving) for shape in work.layers.values()), notes


def _forward(batch: StreamBatch, module: nn.Module, index: int, state: BlockState) -> None:
    batch.waiting = state
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
