"""Weights that are read from disk while the block before them is computed with."""

import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from hesse.checkpoints.checkpoint import Checkpoint
from hesse.checkpoints.files import tensor_entries


class Place(NamedTuple):
    """Where a stored tensor lies."""

    path: Path
    start: int  # bytes from the beginning of the file
    size: int


class ReadAhead:
    """Reads tensors of a checkpoint, those that were announced without a wait where it can.

    For a CPU the system is asked to bring what is announced from the disk, which takes none of this process's memory.
    For a GPU a thread reads it into pinned memory, so that it is copied to the GPU at the full rate; no GPU has run
    that yet. What is announced and never read costs the reading.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        self.checkpoint = checkpoint
        self._thread = ThreadPoolExecutor(1, "read-ahead") if device.type == "cuda" else None
        self._coming: tuple[list[str], Future[dict[str, Tensor]]] | None = None
        self._places: dict[str, Place] | None = None

    def announce(self, names: Iterable[str]) -> None:
        """The dense tensors `names` will be read next."""
        wanted = list(names)
        if self._thread is not None:
            self._coming = wanted, self._thread.submit(self._pinned, wanted)
            return
        for name in wanted:
            place = self._place(name)
            if place is not None:
                _bring(place)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The dense tensors `names`, on the CPU.

        Raises:
            CheckpointError: one is missing or cannot be read.
        """
        wanted = list(names)
        coming, self._coming = self._coming, None
        if coming is not None and coming[0] == wanted:
            return coming[1].result()
        return self.checkpoint.read(wanted)

    def _pinned(self, names: list[str]) -> dict[str, Tensor]:
        return {name: tensor.pin_memory() for name, tensor in self.checkpoint.read(names).items()}

    def _place(self, name: str) -> Place | None:
        """Where a tensor lies; None where it is made of others that are stored."""
        if self._places is None:
            shards = {self.checkpoint.folder / shard for shard in self.checkpoint.shard_of.values()}
            self._places = {name: place for path in shards for name, place in _places(path).items()}
        return self._places.get(name)


def _places(path: Path) -> dict[str, Place]:
    """Where each tensor of a safetensors file lies; none if the file is no longer what was opened before."""
    try:
        entries, data = tensor_entries(path)
    except (OSError, ValueError):
        return {}
    return {
        name: Place(path, data + entry["data_offsets"][0], entry["data_offsets"][1] - entry["data_offsets"][0])
        for name, entry in entries.items()
    }


def _bring(place: Place) -> None:
    """Have the system read a part of a file; where it cannot be asked, it is read when it is needed."""
    if not hasattr(os, "posix_fadvise"):
        return
    with suppress(OSError), place.path.open("rb") as file:
        os.posix_fadvise(file.fileno(), place.start, place.size, os.POSIX_FADV_WILLNEED)
