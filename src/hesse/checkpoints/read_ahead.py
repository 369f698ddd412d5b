"""Read the next block's weights from disk during the computation of the present block."""

import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hesse.checkpoints.files import tensor_entries


class TensorPlace(NamedTuple):
    """Place of a stored tensor in a file."""

    path: Path
    start: int  # bytes from the beginning of the file
    size: int


class TensorSource(Protocol):
    """Tensors of a model folder, by name."""

    @property
    def folder(self) -> Path:
        """Return the model folder."""

    @property
    def shard_of(self) -> dict[str, str]:
        """Return the file of each stored tensor."""

    def keys(self, name: str) -> tuple[str, ...]:
        """Return the names of the tensors that the tensor `name` is read from."""

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read the tensors `names`."""


class ReadAhead:
    """Reader of a checkpoint's tensors that fetches announced tensors in advance.

    For a CPU it asks the system to load announced tensors into the page cache, which takes no memory of this process.
    For a GPU a thread reads them into pinned memory, so that they are copied to the GPU at the full rate; no GPU has
    run that yet. A tensor that is announced but never read costs the reading.
    """

    def __init__(self, source: TensorSource, device: torch.device) -> None:
        self.source = source
        self._thread = ThreadPoolExecutor(1, "read-ahead") if device.type == "cuda" else None
        self._pending: tuple[list[str], Future[dict[str, Tensor]]] | None = None
        self._places: dict[str, TensorPlace] | None = None

    def announce(self, names: Iterable[str]) -> None:
        """Start to fetch the dense tensors `names`, which will be read next."""
        requested = list(names)
        if self._thread is not None:
            self._pending = requested, self._thread.submit(self._read_pinned, requested)
            return
        for key in dict.fromkeys(key for name in requested for key in self.source.keys(name)):
            place = self._place(key)
            if place is not None:
                _prefetch(place)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read the dense tensors `names`, on the CPU.

        Raises:
            CheckpointError: a tensor is missing or cannot be read.
        """
        requested = list(names)
        pending, self._pending = self._pending, None
        if pending is not None and pending[0] == requested:
            return pending[1].result()
        return self.source.read(requested)

    def _read_pinned(self, names: list[str]) -> dict[str, Tensor]:
        return {name: tensor.pin_memory() for name, tensor in self.source.read(names).items()}

    def _place(self, name: str) -> TensorPlace | None:
        """Return the place of a tensor; None if it is decoded from other stored tensors."""
        if self._places is None:
            shards = {self.source.folder / shard for shard in self.source.shard_of.values()}
            self._places = {name: place for path in shards for name, place in _places(path).items()}
        return self._places.get(name)


def _places(path: Path) -> dict[str, TensorPlace]:
    """Return the place of each tensor in a safetensors file; empty if the file has changed since it was opened."""
    try:
        entries, data = tensor_entries(path)
    except (OSError, ValueError):
        return {}
    return {
        name: TensorPlace(path, data + entry["data_offsets"][0], entry["data_offsets"][1] - entry["data_offsets"][0])
        for name, entry in entries.items()
    }


def _prefetch(place: TensorPlace) -> None:
    """Ask the system to read a part of a file into its cache, if it supports that."""
    if not hasattr(os, "posix_fadvise"):
        return
    with suppress(OSError), place.path.open("rb") as file:
        os.posix_fadvise(file.fileno(), place.start, place.size, os.POSIX_FADV_WILLNEED)
