"""Output factors on disk: those of all layers are needed long after they were estimated, and one layer's at a time."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from hesse.checkpoints.writer import write_tensors, writing


class StoredFactors(Mapping[str, Tensor]):
    """A tensor for each layer name, each in a file of its own below `folder`, read whenever it is asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, tuple[Path, str]] = {}  # and the device that each came from

    def keep(self, name: str, factor: Tensor) -> Path:
        """Write the factor of the layer `name`; the file.

        Raises:
            OutputError: the disk is full or cannot be written.
        """
        path = self._folder / f"factor-{len(self._files)}.safetensors"
        with writing(self._folder):
            write_tensors(path, {"factor": factor})
        self._files[name] = (path, str(factor.device))
        return path

    def add(self, name: str, path: Path, device: torch.device) -> None:
        """Take a factor that was written before."""
        self._files[name] = (path, str(device))

    def __getitem__(self, name: str) -> Tensor:
        path, device = self._files[name]
        return load_file(path, device=device)["factor"]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)
