"""A checkpoint as it would be on disk after a rewriting: the same function of other weights."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hesse.checkpoints.checkpoint import Checkpoint
from hesse.errors import DataError
from hesse.finite import all_finite
from hesse.rewriting.maps import Map
from hesse.rewriting.streams import HEAD, Stream


class Change(NamedTuple):
    """A map of the features of a stream."""

    stream: Stream
    map: Map


class RewrittenCheckpoint(Checkpoint):
    """A dense checkpoint with `changes` taken into its tensors as they are read, one tensor in memory at a time.

    Each is computed in float32 at least, in float64 where it is stored in float32, and rounded to its own type, so that
    the function is that of `base` up to one rounding of each weight. With `head`, the tensor that is the head now, the
    model has one of its own even where that is its embeddings, which have no norm to take in.

    Raises:
        DataError: when a tensor is read whose type cannot hold what becomes of it.
    """

    def __init__(self, base: Checkpoint, changes: Sequence[Change] = (), head: str | None = None) -> None:
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

    def change(self, changes: Sequence[Change]) -> None:
        """Have tensors read with these changes from now on, one after another, in place of those there were."""
        self.changes = tuple(changes)
        self._steps: dict[str, list[tuple[Change, bool]]] = {}
        for change in changes:
            for name in change.stream.writers:
                self._steps.setdefault(name, []).append((change, True))
            for name in change.stream.readers:
                self._steps.setdefault(name, []).append((change, False))

    def read_stored(self, names: Iterable[str]) -> dict[str, Tensor]:
        wanted = list(names)
        stored = self._base.read_stored(dict.fromkeys(self._alias.get(name, name) for name in wanted))
        return {name: self._rewritten(name, stored[self._alias.get(name, name)]) for name in wanted}

    def _rewritten(self, name: str, tensor: Tensor) -> Tensor:
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
            raise DataError(
                f"{name} holds NaN or infinity once it is rewritten in {tensor.dtype}: the model is damaged"
            )
        return result
