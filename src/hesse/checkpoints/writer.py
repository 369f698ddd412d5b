"""Write a model's tensors to disk block by block, assemble them into shards, and read them back."""

import ctypes
import json
import math
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hesse.checkpoints.checkpoint import INDEX, SINGLE
from hesse.checkpoints.files import tensor_entries, unfinished_file
from hesse.errors import OutputError, VerificationError

SHARD_BYTES = 1 << 30  # a smaller checkpoint is one file
LARGE_BYTES = 1 << 26  # a part of at least this size is a shard by itself
COPIED_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class WrittenPart:
    """Tensors in a file of their own, which becomes a shard or a piece of a shard."""

    path: Path
    checksums: dict[str, int]  # CRC-32 of each tensor, by name
    bytes: int  # of the tensors

    @classmethod
    def of(cls, path: Path, tensors: Mapping[str, Tensor]) -> "WrittenPart":
        """Return the part of `tensors` in the file `path`, which this or another process writes."""
        checksums = {name: _checksum(tensor) for name, tensor in tensors.items()}
        return cls(path, checksums, sum(tensor.nbytes for tensor in tensors.values()))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: dict[str, str] | None = None) -> None:
    """Write a safetensors file, which appears only when it is complete, with the permissions of a new file.

    The only caller of safetensors' `save_file`, whose files only their owner may read, whatever the umask, and whose
    metadata have a random order; here equal arguments give equal bytes. Errors of the file system are not caught: see
    `writing`.
    """
    with unfinished_file(path) as unfinished:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, unfinished, header)
        if header and len(header) > 1:
            _sort_metadata(unfinished)


def write_part(path: Path, tensors: dict[str, Tensor]) -> WrittenPart:
    """Write `tensors` to a file, and keep no reference to them.

    Raises:
        OutputError: the disk is full or cannot be written.
    """
    with writing(path.parent.parent):
        write_tensors(path, tensors, {"format": "pt"})
    return WrittenPart.of(path, tensors)


def assemble(parts: list[WrittenPart], folder: Path) -> None:
    """Write the weights' files in `folder` from all parts: one file, or shards and their index. The parts are kept.

    A large part becomes a shard by a hard link to its file, so that nothing large is written twice. The function may be
    called again.

    Raises:
        OutputError: the disk is full or cannot be written.
    """
    shards: list[list[WrittenPart]] = []
    single = sum(part.bytes for part in parts) <= SHARD_BYTES
    small: list[WrittenPart] = []  # the present shard of small parts
    for part in parts:
        if not single and part.bytes >= LARGE_BYTES:
            shards.append([part])
            continue
        if not small or sum(other.bytes for other in small) + part.bytes > SHARD_BYTES:
            small = []
            shards.append(small)
        small.append(part)
    weight_map: dict[str, str] = {}
    for index, members in enumerate(shards, 1):
        final = SINGLE if len(shards) == 1 else f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        with writing(folder.parent):
            (folder / final).unlink(missing_ok=True)
            if len(members) == 1:
                link_or_copy(members[0].path, folder / final)
            else:
                _join([part.path for part in members], folder / final)
        weight_map |= {name: final for part in members for name in part.checksums}
    if len(shards) > 1:
        metadata = {"total_size": sum(part.bytes for part in parts)}
        index_text = json.dumps({"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}, indent=2)
        write_text(folder / INDEX, index_text + "\n")


def check_assembled(parts: list[WrittenPart], folder: Path) -> None:
    """Compare every tensor of the weights' files in `folder` with what was written in `parts`.

    Raises:
        VerificationError: a tensor reads back different, is missing, or belongs to no part.
    """
    expected = {name: checksum for part in parts for name, checksum in part.checksums.items()}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                if _checksum(file.get_tensor(name)) != expected.pop(name, None):
                    raise VerificationError(
                        f"{name} reads back different from what was written: nothing was put in place; check the disk, "
                        "and report it if it happens again"
                    )
    if expected:
        raise VerificationError(f"{min(expected)} was written but is in no file of {folder}: check the disk")


def memory_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor, to read or write; a NumPy view would keep the storage alive."""
    return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


def _checksum(tensor: Tensor) -> int:
    values = tensor.detach().cpu().contiguous()
    return zlib.crc32(memory_of(values)) if values.nbytes else 0


def link_or_copy(path: Path, second: Path) -> None:
    """Make a hard link to a file, or a copy if the file system has no hard links; replace an existing file.

    Errors of the file system are not caught.
    """
    second.unlink(missing_ok=True)
    try:
        second.hardlink_to(path)
    except OSError:
        shutil.copyfile(path, second)


@contextmanager
def writing(place: Path, done: str = "written") -> Iterator[None]:
    """Turn errors inside into an OutputError: `place` cannot be `done` (written or read), and what to do.

    Raises:
        OutputError: the disk is full or cannot be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{place} cannot be {done}: {disk_reason(error)}") from None


def _join(parts: list[Path], path: Path) -> None:
    """Join `parts` to one safetensors file, copying bytes so that no tensor is in memory.

    The format is: eight bytes of header length, a JSON header with each tensor's type, shape and place, and the data.
    Wide types come first, as safetensors itself orders them, so that every tensor is aligned.
    """
    tensors: list[tuple[int, str, dict[str, Any], Path, int]] = []
    for part in parts:
        entries, data = tensor_entries(part)
        for name, entry in entries.items():
            start, stop = entry["data_offsets"]
            width = (stop - start) // max(math.prod(entry["shape"]), 1)
            tensors.append((-width, name, entry, part, data + start))
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


def _sort_metadata(path: Path) -> None:
    """Sort the metadata of a safetensors file by name, in place: the header keeps its length."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        if len(text) != length:
            raise AssertionError(f"the header of {path} has another length after sorting")
        file.seek(8)
        file.write(text)


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
    with writing(path.parent.parent):
        path.write_text(text, encoding="utf-8")


def disk_reason(error: Exception) -> str:
    """Return the reason of a failed write, with advice."""
    text = str(error)
    if "No space left" in text or "StorageFull" in text or "code: 28" in text:
        return "the disk is full; free some space, or give an OUT on another disk"
    return text
