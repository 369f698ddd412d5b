"""Offload the activations of batches that wait inside a block, to disk."""

import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hesse.checkpoints.writer import memory_of, writing


class OffloadToDisk(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Write the activations of waiting greenlets to files below `folder`, one file per greenlet.

    The mode records the tensors that a greenlet creates while it runs; their storages are empty while it waits. Tensors
    of `shared()` (weights, masks, positions) and views of them are not touched.
    """

    def __init__(self, folder: Path, shared: Callable[[], Iterable[Tensor]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.folder, self.shared = folder, shared
        self._made: dict[greenlet, list[weakref.ref[Tensor]]] = {}
        self._away: dict[greenlet, list[tuple[torch.UntypedStorage, int]]] = {}
        self._numbers: dict[greenlet, int] = {}

    def resume(self, runner: greenlet) -> Any:
        """Restore a greenlet's activations and switch to it; return the value of its next stop, None at its end."""
        if runner in self._away:
            with writing(self.folder), self._path(runner).open("rb") as file:
                for storage, size in self._away.pop(runner):
                    storage.resize_(size)
                    room = torch.empty(size, dtype=torch.uint8)
                    if file.readinto(memory_of(room)) != size:
                        raise OSError("it is shorter than what was written to it")
                    _bytes(storage).copy_(room)
        with self:
            return runner.switch()

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
        """Write the tensors of a waiting greenlet to its file and empty them; remove the file of one that has ended."""
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

    def _path(self, runner: greenlet) -> Path:
        return self.folder / f"paused-{self._numbers.setdefault(runner, len(self._numbers))}.bin"


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
