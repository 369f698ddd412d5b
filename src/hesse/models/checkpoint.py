"""A model's tensors on disk: named, read one at a time, never all at once."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hesse.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Checkpoint:
    """A Hugging Face folder with safetensors weights.

    Shards are opened for each read and closed after it, so that pages of the file that were read do not stay in
    memory. Subclasses in `hesse.formats` present compressed tensors under their dense names.

    Raises:
        CheckpointError: the folder, its config, an index, a shard or a tensor is missing or cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_json(folder / "config.json")
        self.shard_of = _shard_of(folder)
        self._header: dict[str, tuple[torch.dtype, torch.Size]] = {}
        for shard in sorted(set(self.shard_of.values())):
            with self._open(shard) as file:
                present = set(file.keys())
                for name in (n for n, s in self.shard_of.items() if s == shard):
                    if name not in present:
                        raise CheckpointError(f"{folder / shard} lacks the tensor {name} that the index says it holds")
                    view = file.get_slice(name)
                    self._header[name] = (_DTYPES.get(view.get_dtype(), torch.float32), torch.Size(view.get_shape()))

    @contextmanager
    def _open(self, shard: str) -> Iterator[Any]:
        path = self.folder / shard
        try:
            with safe_open(path, framework="pt") as file:
                yield file
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing: copy the whole model folder again") from None
        except SafetensorError as error:
            raise CheckpointError(f"{path} is truncated or damaged ({error}): copy it again") from None

    def stored_names(self) -> list[str]:
        """Names of the tensors in the files."""
        return list(self.shard_of)

    def names(self) -> list[str]:
        """Names of the dense tensors that `read` gives."""
        return self.stored_names()

    def shape(self, name: str) -> torch.Size:
        """Shape of the stored tensor `name`."""
        return self._header[name][1]

    def dtype(self, name: str) -> torch.dtype:
        """Type of the stored tensor `name`."""
        return self._header[name][0]

    def read_stored(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The stored tensors `names`, as copies that outlive the file."""
        by_shard: dict[str, list[str]] = {}
        for name in names:
            if name not in self.shard_of:
                raise CheckpointError(f"{self.folder} has no tensor {name}")
            by_shard.setdefault(self.shard_of[name], []).append(name)
        tensors = {}
        for shard, wanted in by_shard.items():
            with self._open(shard) as file:
                for name in wanted:
                    tensors[name] = file.get_tensor(name).clone()
        return tensors

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The dense tensors `names`."""
        return self.read_stored(names)

    @property
    def stored_bytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(tensor_bytes(shape, dtype) for dtype, shape in self._header.values())

    @property
    def file_bytes(self) -> int:
        """Bytes of the safetensors files on disk."""
        return sum((self.folder / shard).stat().st_size for shard in set(self.shard_of.values()))


def tensor_bytes(shape: torch.Size, dtype: torch.dtype) -> int:
    """Bytes of a tensor of `shape` and `dtype`."""
    return shape.numel() * dtype.itemsize


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a model folder."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path} is missing: give the folder of a complete Hugging Face model") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): copy it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} does not hold a JSON object: copy it again")
    return content


def _shard_of(folder: Path) -> dict[str, str]:
    """The shard file of each tensor."""
    if (folder / INDEX).exists():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{folder / INDEX} has no weight_map: copy it again")
        for shard in sorted(set(weight_map.values())):
            if not (folder / shard).is_file():
                raise CheckpointError(f"{folder / shard} is missing: copy the whole model folder again")
        return dict(weight_map)
    path = folder / SINGLE
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has neither {SINGLE} nor {INDEX}; for .bin weights load the model in transformers and "
            "save_pretrained() it, which writes safetensors"
        )
    try:
        with safe_open(path, framework="pt") as file:
            return dict.fromkeys(file.keys(), SINGLE)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error}): copy it again") from None


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
