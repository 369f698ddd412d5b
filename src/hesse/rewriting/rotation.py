"""Rotations, random or learned, of the residual stream and of each head's values."""

from collections.abc import Callable

import torch
from torch import Tensor

from hesse.checkpoints.checkpoint import Checkpoint
from hesse.networks.network import CheckpointNetwork
from hesse.passes.stream import StreamBatch
from hesse.rewriting.checkpoint import StreamChange
from hesse.rewriting.hadamard import random_hadamard
from hesse.rewriting.kurtosis import learn_rotation
from hesse.rewriting.maps import Folding, Rotation
from hesse.rewriting.stream_inputs import stream_inputs
from hesse.rewriting.streams import Streams

LEARNED_TOKENS = 1024  # per learned rotation; twice as many, from all blocks, for that of the residual stream


def fold_norms(checkpoint: Checkpoint, streams: Streams) -> list[StreamChange]:
    """Return changes that move the scales of all norms into their readers, so that rotations commute with the norms."""
    changes = []
    for stream in streams.norms:
        (scale,) = checkpoint.read_stored(stream.writers).values()
        changes.append(StreamChange(stream, Folding((scale.double() + stream.offset)[None])))
    return changes


def draw_rotations(checkpoint: Checkpoint, streams: Streams, seed: int) -> list[StreamChange]:
    """Draw a random Hadamard rotation of the residual stream, and one of each head's values. Source: QuaRot."""
    generator = torch.Generator().manual_seed(seed)
    assert streams.residual is not None
    changes = []
    for stream in (streams.residual, *(block.values for block in streams.blocks)):
        size = checkpoint.shape(stream.writers[0])[0] // stream.heads
        drawn = [random_hadamard(size, generator) for _ in range(stream.heads)]
        changes.append(StreamChange(stream, Rotation(torch.stack(drawn))))
    return changes


def learn_rotations(
    network: CheckpointNetwork, streams: Streams, flows: list[StreamBatch], seed: int, step: Callable[[], None]
) -> list[StreamChange]:
    """Learn rotations from the inputs of their readers, starting from random Hadamard rotations. Source: KurTail.

    `network` has folded norms, `flows` are the inputs of its first block; `step` is called after each block.
    """
    start = draw_rotations(network.checkpoint, streams, seed)
    tokens = sum(flow.ids.numel() for flow in flows)
    blocks = len(streams.blocks)
    residual, learned = list[Tensor](), list[StreamChange]()
    for _, block, inputs in stream_inputs(network, streams, flows, every=-(-tokens // LEARNED_TOKENS)):
        residual += [inputs[stream.name].sampled[::blocks] for stream in (block.attention, block.feedforward)]
        learned.append(_learn_from(start[1 + len(learned)], inputs[block.values.name].sampled))
        step()
    return [_learn_from(start[0], torch.cat(residual)), *learned]


def _learn_from(start: StreamChange, inputs: Tensor) -> StreamChange:
    """Learn the rotation of a stream's features from its readers' inputs (tokens, features · repeats)."""
    rotations = start.map.values
    heads, size = rotations.shape[:2]
    by_head = inputs.view(len(inputs), heads, -1, size).transpose(0, 1).reshape(heads, -1, size)
    learned = [learn_rotation(head, rotation) for head, rotation in zip(by_head, rotations, strict=True)]
    return StreamChange(start.stream, Rotation(torch.stack(learned)))
