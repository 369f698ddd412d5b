"""A checkpoint that is still to be written: what transformers would make of it, asked before any work."""

import json
import tempfile
from pathlib import Path

import torch

from hesse.checkpoints.checkpoint import Checkpoint
from hesse.formats.base import DenseFormat
from hesse.formats.loaded_network import needs_code, open_loaded


class PlannedCheckpoint:
    """The names, shapes and types of the tensors that a format would write, and its config.json in `folder`."""

    def __init__(self, format: DenseFormat, folder: Path) -> None:
        self.folder = folder
        (folder / "config.json").write_text(json.dumps(format.config()), encoding="utf-8")
        source: Checkpoint = format.network.checkpoint
        self._tensors = {name: (source.shape(name), source.dtype(name)) for name in source.stored_names()}
        tensors = format.network.tensors
        for name, layer in format.layers.items():
            keys = tensors.keys(f"{name}.weight")
            parts = [part.removesuffix(".weight") for part in tensors.by_key[keys[0]]]
            alone = any(format.stands_alone(part) for part in parts)
            if alone or (layer.constraint is not None and tensors.is_stored(f"{name}.weight")):
                for key in keys:
                    self._tensors.pop(key, None)
                self._tensors |= {key: (meta.shape, meta.dtype) for key, meta in format.stored(name).items()}

    def stored_names(self) -> list[str]:
        """Return the names of the tensors."""
        return list(self._tensors)

    def shape(self, name: str) -> torch.Size:
        """Return the shape of a tensor."""
        return self._tensors[name][0]

    def dtype(self, name: str) -> torch.dtype:
        """Return the type of a tensor."""
        return self._tensors[name][1]


def planned_obstacle(format: DenseFormat) -> str | None:
    """Return the reason why transformers would not load what `format` will write; None if it would.

    Formats with code of their own are not asked: that code is never run here.
    """
    if needs_code(format.config()):
        return None
    with tempfile.TemporaryDirectory() as folder:
        planned = PlannedCheckpoint(format, Path(folder))
        loaded = open_loaded(planned, format.network.checkpoint, format.network.device)
    return loaded if isinstance(loaded, str) else None
