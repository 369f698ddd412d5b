"""Keep statistics on disk: they are needed long after the backward pass, one layer at a time."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from hesse.checkpoints.writer import write_tensors, writing


class StoredStatistics(Mapping[str, Mapping[str, Tensor]]):
    """Statistics of each layer by name, each in a file of its own below `folder`, read on each access."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._layers: dict[str, _LayerFiles] = {}
        self._number = 0

    def keep(self, layer: str, statistic: str, value: Tensor) -> Path:
        """Write a layer's statistic; return its file.

        Raises:
            OutputError: the disk is full or cannot be written.
        """
        path = self._folder / f"statistic-{self._number}.safetensors"
        with writing(self._folder):
            write_tensors(path, {"value": value})
        self.add(layer, statistic, path, value.device)
        return path

    def add(self, layer: str, statistic: str, path: Path, device: torch.device) -> None:
        """Add a statistic that was written before."""
        self._layers.setdefault(layer, _LayerFiles()).files[statistic] = (path, str(device))
        self._number += 1

    def __getitem__(self, layer: str) -> Mapping[str, Tensor]:
        return self._layers[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


class _LayerFiles(Mapping[str, Tensor]):
    """One layer's statistics."""

    def __init__(self) -> None:
        self.files: dict[str, tuple[Path, str]] = {}  # and the device that each came from

    def __getitem__(self, statistic: str) -> Tensor:
        path, device = self.files[statistic]
        return load_file(path, device=device)["value"]

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)
