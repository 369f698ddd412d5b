"""Present a checkpoint as a rewriting would leave it on disk: other weights with the same function."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hesse.checkpoints.checkpoint import Checkpoint
from hesse.errors import DataError
from hesse.finite import all_finite
from hesse.rewriting.maps import FeatureMap
from hesse.rewriting.streams import HEAD, Stream


class StreamChange(NamedTuple):
    """A map of a stream's features."""

    stream: Stream
    map: FeatureMap


class RewrittenCheckpoint(Checkpoint):
    """Dense checkpoint whose tensors are changed as they are read, one tensor in memory at a time.

    Changes are computed in float32 or, for a tensor stored in float32, in float64, and rounded once to the stored type,
    so the function equals that of `base` up to one rounding of each weight. `head` names the tensor that is the head of
    `base`: the model then has a head of its own, even if `base` ties it to the embeddings, which must not absorb the
    scales of the last norm.

    Raises:
        DataError: on reading a tensor whose type cannot hold the changed values.
    """

    def __init__(self, base: Checkpoint, changes: Sequence[StreamChange] = (), head: str | None = None) -> None:
        self.folder = base.folder
        self.config = dict(base.config)
        self.shard_of = dict(base.shard_of)
        self._header = dict(base._header)
        self._base = base
        self._alias: dict[str, str] = {}
        if head is not None:
            self.config["tie_word_embeddings"] = False
            self._alias[HEAD] = head
            self.shard_of[HEAD] = base.shard_of[head]
            self._header[HEAD] = base._header[head]
        self.change(changes)

    def change(self, changes: Sequence[StreamChange]) -> None:
        """Replace the changes; tensors are read with `changes` applied in order."""
        self.changes = tuple(changes)
        self._steps: dict[str, list[tuple[StreamChange, bool]]] = {}
        for change in changes:
            for name in change.stream.writers:
                self._steps.setdefault(name, []).append((change, True))
            for name in change.stream.readers:
                self._steps.setdefault(name, []).append((change, False))

    def read_stored(self, names: Iterable[str]) -> dict[str, Tensor]:
        requested = list(names)
        stored = self._base.read_stored(dict.fromkeys(self._alias.get(name, name) for name in requested))
        return {name: self._rewrite(name, stored[self._alias.get(name, name)]) for name in requested}

    def _rewrite(self, name: str, tensor: Tensor) -> Tensor:
        steps = self._steps.get(name, [])
        if not steps:
            return tensor
        value = tensor.to(torch.float64 if tensor.dtype.itemsize >= 4 else torch.float32)
        for (stream, map), writes in steps:
            if writes:
                matrix = value + stream.offset if value.ndim == 2 else (value + stream.offset)[:, None]
                value = map.on_outputs(matrix).view(value.shape) - stream.offset
            else:
                value = map.on_inputs(value)
        result = value.to(tensor.dtype)
        if not all_finite(result):
            raise DataError(f"{name} holds NaN or infinity after rewriting in {tensor.dtype}: the model is damaged")
        return result
