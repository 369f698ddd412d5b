"""Offload tensors to memory or to files; the system's page cache holds the files while there is room."""

import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from hesse.checkpoints.writer import memory_of, writing
from hesse.errors import OutputError


class StoredTensor(Protocol):
    """An offloaded tensor."""

    def tensor(self) -> Tensor:
        """Return the tensor, bit for bit."""


@dataclass(frozen=True, eq=False)
class InMemory:
    """A tensor that stays in memory."""

    value: Tensor

    def tensor(self) -> Tensor:
        return self.value


@dataclass(frozen=True, eq=False)
class InFile:
    """A tensor in a file."""

    file: "TensorFile"
    number: int

    def tensor(self) -> Tensor:
        return self.file.read(self.number)


class TensorFile:
    """A file of tensors; it is deleted when nothing refers to it any more, unless it is `lasting`.

    The file is closed between uses, so any number of them may exist.
    """

    def __init__(
        self, path: Path, device: torch.device, lasting: bool, entries: list[dict[str, Any]] | None = None
    ) -> None:
        self.path, self.device = path, device
        self.entries = [] if entries is None else entries  # offset, type and shape of each tensor
        if entries is None:
            path.unlink(missing_ok=True)
        if not lasting:
            weakref.finalize(self, path.unlink, missing_ok=True)

    def append(self, tensor: Tensor) -> int:
        """Append a tensor, and return its number.

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
        """Read the tensor with that number.

        Raises:
            OutputError: the file cannot be read, or is shorter than it was.
        """
        entry = self.entries[number]
        values = torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]))
        buffer = memory_of(values)
        with writing(self.path, "read"), self.path.open("rb") as file:
            file.seek(entry["start"])
            size = file.readinto(buffer)
        if size != len(buffer):
            raise OutputError(f"{self.path} is shorter than what was written to it: check the disk")
        return values.to(self.device)


class TensorStore:
    """Store for hidden states between two blocks: files below `folder`, or memory without a folder.

    Each step has its own file `NAME-STEP.bin`.
    """

    def __init__(self, folder: Path | None = None, name: str = "hidden", lasting: bool = False) -> None:
        self.folder, self.name, self.lasting = folder, name, lasting
        self._files: weakref.WeakValueDictionary[int, TensorFile] = weakref.WeakValueDictionary()

    def keep(self, tensor: Tensor, step: int) -> StoredTensor:
        """Store a tensor of step `step`."""
        if self.folder is None:
            return InMemory(tensor)
        file = self._files.get(step)
        if file is None:
            file = self._files[step] = TensorFile(self.path(step), tensor.device, self.lasting)
        return InFile(file, file.append(tensor))

    def path(self, step: int) -> Path:
        """Return the file of a step."""
        assert self.folder is not None
        return self.folder / f"{self.name}-{step}.bin"
