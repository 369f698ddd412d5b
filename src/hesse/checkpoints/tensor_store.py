"""Tensors that wait for their turn: in memory, or in files, which the system's page cache holds while there is room."""

import ctypes
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from hesse.checkpoints.writer import writing
from hesse.errors import OutputError


class StoredTensor(Protocol):
    """A tensor that is not needed now."""

    def tensor(self) -> Tensor:
        """The tensor, bit for bit as it was."""


@dataclass(frozen=True, eq=False)
class InMemory:
    """A tensor that waits where it is."""

    held: Tensor

    def tensor(self) -> Tensor:
        return self.held


@dataclass(frozen=True, eq=False)
class InFile:
    """A tensor that waits in a file."""

    file: "TensorFile"
    number: int

    def tensor(self) -> Tensor:
        return self.file.read(self.number)


class TensorFile:
    """Tensors one after another in a file, which goes when nothing refers to it any more, unless it is `lasting`.

    It is closed between two uses, so any number of them may exist.
    """

    def __init__(
        self, path: Path, device: torch.device, lasting: bool, entries: list[dict[str, Any]] | None = None
    ) -> None:
        self.path, self.device = path, device
        self.entries = [] if entries is None else entries  # where each tensor lies, its type and its shape
        if entries is None:
            path.unlink(missing_ok=True)
        if not lasting:
            weakref.finalize(self, path.unlink, missing_ok=True)

    def append(self, tensor: Tensor) -> int:
        """Write a tensor behind the others; its number.

        Raises:
            OutputError: the disk is full or cannot be written.
        """
        values = tensor.detach().to("cpu").contiguous()
        with writing(self.path.parent), self.path.open("ab") as file:
            start = file.tell()
            file.write(memory_of(values))
        dtype = str(values.dtype).removeprefix("torch.")
        self.entries.append({"start": start, "dtype": dtype, "shape": list(values.shape)})
        return len(self.entries) - 1

    def read(self, number: int) -> Tensor:
        """The tensor that was written as `number`.

        Raises:
            OutputError: the file is not as it was written.
        """
        entry = self.entries[number]
        values = torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]))
        room = memory_of(values)
        with writing(self.path, "read"), self.path.open("rb") as file:
            file.seek(entry["start"])
            found = file.readinto(room)
        if found != len(room):
            raise OutputError(f"{self.path} is shorter than what was written to it: check the disk")
        return values.to(self.device)


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, to read or write; NumPy's view would keep it from being emptied."""
    return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


class TensorStore:
    """Where the hidden states of flows wait between two blocks: in files below `folder`, or without one in memory.

    Each step has a file of its own, `NAME-STEP.bin`.
    """

    def __init__(self, folder: Path | None = None, name: str = "hidden", lasting: bool = False) -> None:
        self.folder, self.name, self.lasting = folder, name, lasting
        self._files: weakref.WeakValueDictionary[int, TensorFile] = weakref.WeakValueDictionary()

    def keep(self, tensor: Tensor, step: int) -> StoredTensor:
        """Put a tensor of step number `step` away."""
        if self.folder is None:
            return InMemory(tensor)
        file = self._files.get(step)
        if file is None:
            file = self._files[step] = TensorFile(self.path(step), tensor.device, self.lasting)
        return InFile(file, file.append(tensor))

    def path(self, step: int) -> Path:
        """The file of a step."""
        assert self.folder is not None
        return self.folder / f"{self.name}-{step}.bin"
