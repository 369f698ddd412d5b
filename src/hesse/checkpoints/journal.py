"""Journal of a run's finished steps, on disk, from which the same run can resume."""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch

from hesse.checkpoints.files import unfinished_file
from hesse.checkpoints.tensor_store import InFile, StoredTensor, TensorFile
from hesse.checkpoints.writer import writing
from hesse.errors import OutputError

READ_AT_ONCE = 1 << 22


class Journal:
    """Records of finished steps below a folder, each with the files that belong to it.

    A record holds the size and checksum of its files and is written after them, so that a step whose files a crash left
    incomplete does not count as finished.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def record(self, step: str, content: dict[str, Any], files: Sequence[Path] = ()) -> None:
        """Record that `step` is finished; `files` lie below the folder.

        Raises:
            OutputError: the disk is full or cannot be written.
        """
        with writing(self.folder), unfinished_file(self._path(step)) as beside:
            sums = {path.relative_to(self.folder).as_posix(): _checksum(path) for path in files}
            body = json.dumps({"content": content, "files": sums})
            beside.write_text(f"{zlib.crc32(body.encode()):08x}\n{body}", encoding="utf-8")

    def recall(self, step: str) -> dict[str, Any] | None:
        """Return the record of a finished step; None if it is not finished, or if one of its files is damaged."""
        try:
            sum_of_body, _, body = self._path(step).read_text(encoding="utf-8").partition("\n")
            if f"{zlib.crc32(body.encode()):08x}" != sum_of_body:
                return None
            record = json.loads(body)
            if any(_checksum(self.folder / name) != wanted for name, wanted in record["files"].items()):
                return None
        except (OSError, ValueError):
            return None
        return cast(dict[str, Any], record["content"])

    def expect(self, step: str) -> dict[str, Any]:
        """Return the record of a step that must be finished.

        Raises:
            OutputError: the record is lost.
        """
        content = self.recall(step)
        if content is None:
            raise OutputError(f"{self._path(step)} was written but cannot be read: check the disk")
        return content

    def forget(self, step: str) -> None:
        """Remove a step's record, if there is one, and its files."""
        try:
            record = json.loads(self._path(step).read_text(encoding="utf-8").partition("\n")[2])
        except (OSError, ValueError):
            return
        self._path(step).unlink()
        for name in record["files"]:
            (self.folder / name).unlink(missing_ok=True)

    def record_tensors(self, step: str, tensors: Sequence[StoredTensor], content: dict[str, Any]) -> None:
        """Record a step with its tensors, which lie in one lasting file."""
        described, paths = describe_tensors(tensors)
        self.record(step, {**content, **described}, paths)

    def recall_tensors(self, step: str, device: torch.device) -> tuple[list[StoredTensor], dict[str, Any]] | None:
        """Return the tensors and the record of a finished step; None if it is not finished."""
        content = self.recall(step)
        return None if content is None else (self.find_tensors(content, device), content)

    def find_tensors(self, content: dict[str, Any], device: torch.device) -> list[StoredTensor]:
        """Return the tensors that `describe_tensors` described in a record."""
        file = TensorFile(self.folder / content["in"], device, lasting=True, entries=content["tensors"])
        return [InFile(file, number) for number in range(len(file.entries))]

    def _path(self, step: str) -> Path:
        return self.folder / f"{step}.json"


def describe_tensors(tensors: Sequence[StoredTensor]) -> tuple[dict[str, Any], list[Path]]:
    """Return what a record says of tensors in one lasting file, and the file; none without tensors."""
    waiting = [tensor for tensor in tensors if isinstance(tensor, InFile)]
    paths = list({each.file.path for each in waiting})
    entries = [each.file.entries[each.number] for each in waiting]
    return {"tensors": entries, "in": "".join(path.name for path in paths)}, paths


def _checksum(path: Path) -> list[int]:
    """Return a file's size and CRC-32."""
    size, total = 0, 0
    with path.open("rb") as file:
        while piece := file.read(READ_AT_ONCE):
            size, total = size + len(piece), zlib.crc32(piece, total)
    return [size, total]
