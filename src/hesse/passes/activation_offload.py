"""Flows that are paused inside a block, with what the block holds for them on disk instead of in memory."""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hesse.checkpoints.tensor_store import memory_of
from hesse.checkpoints.writer import writing


class Pauses(Protocol):
    """Told of each greenlet before it goes on, and after it has paused or ended."""

    def bring_back(self, runner: greenlet) -> None:
        """It is about to go on."""

    def put_away(self, runner: greenlet) -> None:
        """It has paused, or ended."""


class PausedInMemory:
    """Pauses that leave everything where it is."""

    def bring_back(self, runner: greenlet) -> None:
        """Nothing was put away."""

    def put_away(self, runner: greenlet) -> None:
        """It stays."""


class PausedOnDisk(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the tensors that each greenlet makes while it is entered, and empties those of paused ones.

    Their contents go to a file of the greenlet's own below `folder`, and come back before it is resumed. What
    `shared()` gives is left alone, whatever views of it a greenlet makes: weights, masks, positions.
    """

    def __init__(self, folder: Path, shared: Callable[[], Iterable[Tensor]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.folder, self.shared = folder, shared
        self._made: dict[greenlet, list[weakref.ref[Tensor]]] = {}
        self._away: dict[greenlet, list[tuple[torch.UntypedStorage, int]]] = {}
        self._numbers: dict[greenlet, int] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        runner = getcurrent()
        if runner.parent is not None:
            made = self._made.setdefault(runner, [])
            made += [weakref.ref(leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        return result

    def put_away(self, runner: greenlet) -> None:
        """Empty what a paused greenlet has made; of one that has ended, remove the file."""
        alive = [(made, tensor) for made in self._made.pop(runner, []) if (tensor := made()) is not None]
        if runner.dead:
            self._path(runner).unlink(missing_ok=True)
            return
        self._made[runner] = [made for made, _ in alive]
        shared = {tensor.untyped_storage().data_ptr() for tensor in self.shared()}
        storages = {}
        for _, tensor in alive:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in shared and storage.resizable() and storage.nbytes():
                storages[storage.data_ptr()] = storage
        self._away[runner] = [(storage, storage.nbytes()) for storage in storages.values()]
        with writing(self.folder), self._path(runner).open("wb") as file:
            for storage, _ in self._away[runner]:
                file.write(memory_of(_bytes(storage).cpu()))
                storage.resize_(0)

    def bring_back(self, runner: greenlet) -> None:
        """Fill again what a greenlet has made, before it goes on."""
        if runner not in self._away:
            return
        with writing(self.folder), self._path(runner).open("rb") as file:
            for storage, size in self._away.pop(runner):
                storage.resize_(size)
                room = torch.empty(size, dtype=torch.uint8)
                if file.readinto(memory_of(room)) != size:
                    raise OSError("it is shorter than what was written to it")
                _bytes(storage).copy_(room)

    def _path(self, runner: greenlet) -> Path:
        return self.folder / f"paused-{self._numbers.setdefault(runner, len(self._numbers))}.bin"


@contextmanager
def pauses_in(folder: Path | None, shared: Callable[[], Iterable[Tensor]]) -> Iterator[Pauses]:
    """Pauses with what greenlets have made in files below `folder`, or without one left as it is."""
    if folder is None:
        yield PausedInMemory()
    else:
        with PausedOnDisk(folder, shared) as mode:
            yield mode


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
