"""What a run has finished, step by step and on disk, so that the same run can go on from there."""

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
    """Records below a folder, one a step, each with the files that belong to it.

    A record holds the size and checksum of its files and is written after them, so that what a crash or a lost page
    left half-written is not taken for finished.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def record(self, step: str, content: dict[str, Any], files: Sequence[Path] = ()) -> None:
        """Note that `step` is finished; `files` lie below the folder.

        Raises:
            OutputError: the disk is full or cannot be written.
        """
        with writing(self.folder), unfinished_file(self._path(step)) as beside:
            sums = {path.relative_to(self.folder).as_posix(): _checksum(path) for path in files}
            body = json.dumps({"content": content, "files": sums})
            beside.write_text(f"{zlib.crc32(body.encode()):08x}\n{body}", encoding="utf-8")

    def recall(self, step: str) -> dict[str, Any] | None:
        """What was noted of a finished step; None if it was not finished, or if a file of it was damaged since."""
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
        """What was noted of a step that is known to be finished.

        Raises:
            OutputError: the note is lost.
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
        """Note a step with the tensors that wait in one lasting file for the next."""
        (file,) = {waiting.file for waiting in tensors if isinstance(waiting, InFile)}
        numbers = [waiting.number for waiting in tensors if isinstance(waiting, InFile)]
        entries = [file.entries[number] for number in numbers]
        self.record(step, {**content, "tensors": entries, "in": file.path.name}, [file.path])

    def recall_tensors(self, step: str, device: torch.device) -> tuple[list[StoredTensor], dict[str, Any]] | None:
        """The tensors and the note of a finished step."""
        content = self.recall(step)
        if content is None:
            return None
        file = TensorFile(self.folder / content["in"], device, lasting=True, entries=content["tensors"])
        return [InFile(file, number) for number in range(len(file.entries))], content

    def _path(self, step: str) -> Path:
        return self.folder / f"{step}.json"


def _checksum(path: Path) -> list[int]:
    """A file's size and CRC-32."""
    size, total = 0, 0
    with path.open("rb") as file:
        while piece := file.read(READ_AT_ONCE):
            size, total = size + len(piece), zlib.crc32(piece, total)
    return [size, total]
