"""Read a model's tensors from disk by name, one at a time."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hesse.checkpoints.config_limits import check_config
from hesse.checkpoints.files import file_digest, is_plain_name, read_json
from hesse.errors import CheckpointError, reason

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MOST_DIMENSIONS = 16


class Checkpoint:
    """Hugging Face model folder with safetensors weights.

    Shards are opened for each read and closed after it, so that their pages do not stay in memory. Subclasses in
    `hesse.formats` present compressed tensors under their dense names.

    Raises:
        CheckpointError: the folder, its config, an index, a shard or a tensor is missing or cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_json(folder / "config.json")
        self.shard_of = _shard_of(folder)
        check_config(folder, self.config, len(self.shard_of))
        self.paths: dict[str, str] = {}  # the loader's name of each layer, by its name here, once a network is built
        self._header: dict[str, tuple[torch.dtype, torch.Size]] = {}
        by_shard: dict[str, list[str]] = {}
        for name, shard in self.shard_of.items():
            by_shard.setdefault(shard, []).append(name)
        for shard, names in sorted(by_shard.items()):
            with _open(folder / shard) as file:
                present = set(file.keys())
                for name in names:
                    if name not in present:
                        raise CheckpointError(f"{folder / shard} lacks the tensor {name} that the index lists")
                    view = file.get_slice(name)
                    self._header[name] = _header_entry(folder / shard, name, view.get_dtype(), view.get_shape())

    def stored_names(self) -> list[str]:
        """Return the names of the tensors in the files."""
        return list(self.shard_of)

    def names(self) -> list[str]:
        """Return the names of the dense tensors that `read` returns."""
        return self.stored_names()

    def shape(self, name: str) -> torch.Size:
        """Return the shape of the stored tensor `name`."""
        return self._entry(name)[1]

    def keys(self, name: str) -> tuple[str, ...]:
        """Return the names of the tensors that the tensor `name` is read from."""
        return (name,)

    def dense_shape(self, name: str) -> torch.Size | None:
        """Return the shape of the dense tensor `name` by the headers alone; None if they do not give it."""
        return self.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Return the type of the stored tensor `name`."""
        return self._entry(name)[0]

    def input_rounding(self, layer: str) -> Callable[[Tensor], Tensor] | None:
        """Return the rounding of the inputs (..., tokens, in) of `layer`; None if they are not rounded."""
        return None

    def _entry(self, name: str) -> tuple[torch.dtype, torch.Size]:
        if name not in self._header:
            raise CheckpointError(f"{self.folder} has no tensor {name}: copy the whole model folder again")
        return self._header[name]

    def read_stored(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read the stored tensors `names`, as copies that do not depend on the file."""
        by_shard: dict[str, list[str]] = {}
        for name in names:
            if name not in self.shard_of:
                raise CheckpointError(f"{self.folder} has no tensor {name}")
            by_shard.setdefault(self.shard_of[name], []).append(name)
        tensors = {}
        for shard, members in by_shard.items():
            with _open(self.folder / shard) as file:
                for name in members:
                    tensors[name] = file.get_tensor(name).clone()
        return tensors

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read the dense tensors `names`."""
        return self.read_stored(names)

    @cached_property
    def digests(self) -> dict[str, str]:
        """Return the SHA-256 of the config and of each weights file, by name; the files are read once."""
        return {name: file_digest(self.folder / name) for name in ("config.json", *sorted(set(self.shard_of.values())))}

    @property
    def stored_bytes(self) -> int:
        """Return the size of all stored tensors, in bytes."""
        return sum(tensor_bytes(shape, dtype) for dtype, shape in self._header.values())

    @property
    def file_bytes(self) -> int:
        """Return the size of the safetensors files on disk, in bytes."""
        return sum((self.folder / shard).stat().st_size for shard in set(self.shard_of.values()))


def tensor_bytes(shape: torch.Size, dtype: torch.dtype) -> int:
    """Return the size of a tensor of `shape` and `dtype`, in bytes."""
    return shape.numel() * dtype.itemsize


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    """Open a safetensors file; the library checks the file against its header."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: copy the whole model folder again") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path} is truncated or damaged ({reason(error)}): copy it again") from None
    except (OSError, RuntimeError, MemoryError) as error:  # torch cannot map or allocate so many bytes
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from None


def _header_entry(path: Path, name: str, dtype: str, shape: list[int]) -> tuple[torch.dtype, torch.Size]:
    """Return the type and shape of a tensor; raise CheckpointError if torch does not have them."""
    if dtype not in _DTYPES:
        raise CheckpointError(
            f"{path}: {name} has the type {dtype}, which Hesse does not read: start from another file"
        )
    if len(shape) > MOST_DIMENSIONS or any(size > torch.iinfo(torch.int64).max for size in shape):
        raise CheckpointError(f"{path}: {name} has a shape that no tensor can have: copy it again")
    return _DTYPES[dtype], torch.Size(shape)


def _shard_of(folder: Path) -> dict[str, str]:
    """Return the shard file of each tensor."""
    if (folder / INDEX).exists():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{folder / INDEX} has no weight_map: copy it again")
        for shard in weight_map.values():
            if not is_plain_name(shard):
                raise CheckpointError(
                    f"{folder / INDEX} places a tensor in {str(shard)[:80]!r}, which is not the name of a file in this "
                    "folder: copy it again"
                )
        for shard in sorted(set(weight_map.values())):
            if not os.path.isfile(folder / shard):  # Path.is_file raises on a name that is too long
                raise CheckpointError(f"{folder / shard} is missing: copy the whole model folder again")
        return dict(weight_map)
    path = folder / SINGLE
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has neither {SINGLE} nor {INDEX}; for .bin weights load the model in transformers and "
            "save_pretrained() it, which writes safetensors"
        )
    with _open(path) as file:
        return dict.fromkeys(file.keys(), SINGLE)


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
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "C64": torch.complex64,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
