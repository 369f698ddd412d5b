"""Rotations of the features that blocks add to and of each head's values, drawn or learned."""

from collections.abc import Callable

import torch
from torch import Tensor

from hesse.checkpoints.checkpoint import Checkpoint
from hesse.networks.network import Network
from hesse.passes.stream import StreamBatch
from hesse.rewriting.checkpoint import Change
from hesse.rewriting.hadamard import random_hadamard
from hesse.rewriting.kurtosis import learn_rotation
from hesse.rewriting.maps import Folding, Rotation
from hesse.rewriting.streams import Streams
from hesse.rewriting.walk import walk

LEARNED_TOKENS = 1024  # that each rotation is learned from; twice as many for that of the residual, of all blocks


def fold_norms(checkpoint: Checkpoint, streams: Streams) -> list[Change]:
    """Have the readers of all norms take in their scales, so that rotations pass the norms."""
    changes = []
    for stream in streams.norms:
        (scale,) = checkpoint.read_stored(stream.writers).values()
        changes.append(Change(stream, Folding((scale.double() + stream.offset)[None])))
    return changes


def draw_rotations(checkpoint: Checkpoint, streams: Streams, seed: int) -> list[Change]:
    """A random Hadamard rotation of the residual, and one for each head's values. Source: QuaRot."""
    generator = torch.Generator().manual_seed(seed)
    assert streams.residual is not None
    changes = []
    for stream in (streams.residual, *(block.values for block in streams.blocks)):
        size = checkpoint.shape(stream.writers[0])[0] // stream.heads
        drawn = [random_hadamard(size, generator) for _ in range(stream.heads)]
        changes.append(Change(stream, Rotation(torch.stack(drawn))))
    return changes


def learn_rotations(
    network: Network, streams: Streams, flows: list[StreamBatch], seed: int, step: Callable[[], None]
) -> list[Change]:
    """Rotations learned from the inputs of the layers that read them, from random Hadamard ones on. Source: KurTail.

    `network` is of a model with norms folded, `flows` what reaches its first block; `step` after each block.
    """
    start = draw_rotations(network.checkpoint, streams, seed)
    tokens = sum(flow.ids.numel() for flow in flows)
    blocks = len(streams.blocks)
    residual, learned = list[Tensor](), list[Change]()
    for _, block, inputs in walk(network, streams, flows, every=-(-tokens // LEARNED_TOKENS)):
        residual += [inputs[stream.name].some[::blocks] for stream in (block.attention, block.feedforward)]
        learned.append(_learned(start[1 + len(learned)], inputs[block.values.name].some))
        step()
    return [_learned(start[0], torch.cat(residual)), *learned]


def _learned(start: Change, inputs: Tensor) -> Change:
    """A rotation of a stream's features learned from its readers' inputs (tokens, features · repeats)."""
    rotations = start.map.values
    heads, size = rotations.shape[:2]
    by_head = inputs.view(len(inputs), heads, -1, size).transpose(0, 1).reshape(heads, -1, size)
    found = [learn_rotation(own, rotation) for own, rotation in zip(by_head, rotations, strict=True)]
    return Change(start.stream, Rotation(torch.stack(found)))
