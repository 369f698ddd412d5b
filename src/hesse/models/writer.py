"""A model's tensors to disk, a shard at a time."""

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from hesse.errors import OutputError
from hesse.models.checkpoint import INDEX, SINGLE

SHARD_BYTES = 1 << 30


class ShardWriter:
    """Collects tensors until a shard is full, writes it, and forgets them; `close` names the shards and the index."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total_bytes = 0

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Write `tensors` now or together with later ones.

        Raises:
            OutputError: the disk is full or cannot be written.
        """
        for name, tensor in tensors.items():
            self._pending[name] = tensor.detach().cpu().contiguous()
            self._pending_bytes += tensor.nbytes
        if self._pending_bytes >= SHARD_BYTES:
            self._flush()

    def close(self) -> None:
        """Write what is left, and the index where there are several shards."""
        if self._pending or not self._shards:
            self._flush()
        count = len(self._shards)
        if count == 1:
            self._temporary(0).rename(self.folder / SINGLE)
            return
        weight_map = {}
        for number, names in enumerate(self._shards):
            final = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._temporary(number).rename(self.folder / final)
            weight_map.update(dict.fromkeys(names, final))
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_text(self.folder / INDEX, json.dumps(index, indent=2) + "\n")

    def _flush(self) -> None:
        try:
            save_file(self._pending, self._temporary(len(self._shards)), metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:
            raise OutputError(f"{self.folder.parent} cannot be written: {disk_reason(error)}") from None
        self._shards.append(list(self._pending))
        self._total_bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0

    def _temporary(self, number: int) -> Path:
        return self.folder / f"shard-{number}.safetensors"


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
