"""A model's tensors to disk, a block at a time, and joined into shards."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from hesse.errors import OutputError
from hesse.models.checkpoint import INDEX, SINGLE

SHARD_BYTES = 1 << 30
COPIED_AT_ONCE = 1 << 24


class ShardWriter:
    """Writes tensors as they come, each call into a file of its own; `close` joins these into shards, and the index."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._parts: list[Path] = []
        self._part_bytes: list[int] = []
        self._names: list[list[str]] = []

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Write `tensors`; nothing of them is kept.

        Raises:
            OutputError: the disk is full or cannot be written.
        """
        part = self.folder / f"part-{len(self._parts)}.safetensors"
        with self._writing():
            save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, part)
        self._parts.append(part)
        self._part_bytes.append(sum(tensor.nbytes for tensor in tensors.values()))
        self._names.append(list(tensors))

    def close(self) -> None:
        """Join the parts into shards of at most SHARD_BYTES, unless one part is larger.

        Raises:
            OutputError: the disk is full or cannot be written.
        """
        shards: list[list[int]] = []
        size = 0
        for number, part_bytes in enumerate(self._part_bytes):
            if not shards or size + part_bytes > SHARD_BYTES:
                shards.append([])
                size = 0
            shards[-1].append(number)
            size += part_bytes
        weight_map: dict[str, str] = {}
        for index, numbers in enumerate(shards, 1):
            final = SINGLE if len(shards) == 1 else f"model-{index:05d}-of-{len(shards):05d}.safetensors"
            with self._writing():
                _join([self._parts[number] for number in numbers], self.folder / final)
            weight_map |= {name: final for number in numbers for name in self._names[number]}
        if len(shards) > 1:
            metadata = {"total_size": sum(self._part_bytes)}
            index_text = json.dumps({"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}, indent=2)
            write_text(self.folder / INDEX, index_text + "\n")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise OutputError(f"{self.folder.parent} cannot be written: {disk_reason(error)}") from None


def _join(parts: list[Path], path: Path) -> None:
    """One safetensors file of all tensors of `parts`, which go; byte by byte, so that none is in memory.

    The format: eight bytes of header length, a JSON header with each tensor's type, shape and place, the data. Wide
    types come first, as safetensors itself orders them, so that every tensor is aligned.
    """
    tensors: list[tuple[int, str, dict[str, Any], Path, int]] = []
    for part in parts:
        with part.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                start, stop = entry["data_offsets"]
                width = (stop - start) // max(math.prod(entry["shape"]), 1)
                tensors.append((-width, name, entry, part, 8 + length + start))
    tensors.sort(key=lambda tensor: tensor[:2])
    merged: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for _, name, entry, _, _ in tensors:
        start, stop = entry["data_offsets"]
        merged[name] = {**entry, "data_offsets": [offset, offset + stop - start]}
        offset += stop - start
    text = json.dumps(merged, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for _, _, entry, part, place in tensors:
            with part.open("rb") as file:
                file.seek(place)
                _copy(file, out, entry["data_offsets"][1] - entry["data_offsets"][0])
    for part in parts:
        part.unlink()


def _copy(source: BinaryIO, target: BinaryIO, size: int) -> None:
    while size:
        piece = source.read(min(size, COPIED_AT_ONCE))
        if not piece:
            raise OSError("a part is shorter than its header says")
        target.write(piece)
        size -= len(piece)


def write_text(path: Path, text: str) -> None:
    """Write a small file of a model folder.

    Raises:
        OutputError: the disk is full or cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path.parent.parent} cannot be written: {disk_reason(error)}") from None


def disk_reason(error: Exception) -> str:
    """What a person can do about a failed write."""
    text = str(error)
    if "No space left" in text or "StorageFull" in text or "code: 28" in text:
        return "the disk is full; free some space, or give an OUT on another disk"
    return text
