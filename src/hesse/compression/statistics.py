"""The curvature of a model that was estimated before, on disk."""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hesse.compression.tokens import Calibration
from hesse.curvature import Gram
from hesse.data import Samples
from hesse.errors import CheckpointError, DataError
from hesse.estimation import load_curvature
from hesse.models.checkpoint import Checkpoint, read_json

INDEX_FILE = "statistics.json"
SENSITIVITIES_FILE = "sensitivities.safetensors"
READ_AT_ONCE = 1 << 22


@dataclass(eq=False)
class Statistics:
    """A folder that `hesse estimate` wrote: a Gram for each layer's inputs, and E[g²] at its outputs.

    Raises:
        CheckpointError: the folder is no such folder.
    """

    folder: Path

    def __post_init__(self) -> None:
        if not (self.folder / INDEX_FILE).is_file():
            raise CheckpointError(f"{self.folder} has no {INDEX_FILE}: give a folder that `hesse estimate` wrote")
        self.content: dict[str, Any] = read_json(self.folder / INDEX_FILE)
        self._last: tuple[str, Gram] | None = None

    def check_model(self, checkpoint: Checkpoint) -> None:
        """Refuse another model.

        Raises:
            CheckpointError: its files are not those that the statistics are of.
        """
        for name, digest in file_digests(checkpoint).items():
            if self.content["model_files"].get(name) != digest:
                raise CheckpointError(
                    f"{self.folder} is of another model than {checkpoint.folder}: {name} differs; estimate it again"
                )

    def calibration(self, asked: Calibration) -> Calibration:
        """What to check the result with: `asked`, or without data the samples that the statistics are of."""
        if asked.data is not None:
            return replace(asked, samples=1)
        return Calibration(batch_size=asked.batch_size, **self.content["samples"])

    def check_samples(self, samples: Samples) -> None:
        """Refuse data that changed since.

        Raises:
            DataError: the samples are not those that the statistics are of.
        """
        if samples.fingerprint() != self.content["samples_fingerprint"]:
            raise DataError(
                f"{samples.source} has changed since {self.folder} was estimated: estimate it again, or give --data"
            )

    def gram(self, layer: str, device: torch.device) -> Gram | None:
        """The Gram of a layer's inputs; None where no token reached it. Layers with one input get one object."""
        file = self.content["grams"].get(layer)
        if file is None:
            return None
        if self._last is None or self._last[0] != file:
            gram = load_curvature(self.folder / file, str(device))
            if not isinstance(gram, Gram):
                raise CheckpointError(f"{self.folder / file} holds a {type(gram).__name__}, not a Gram")
            self._last = (file, gram)
        return self._last[1]

    @cached_property
    def sensitivities(self) -> dict[str, Tensor]:
        """E[g²] of each layer's outputs (out,), in nats per token."""
        try:
            return load_file(self.folder / SENSITIVITIES_FILE)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.folder / SENSITIVITIES_FILE} cannot be read ({error})") from None


def file_digests(checkpoint: Checkpoint) -> dict[str, str]:
    """SHA-256 of the config and of each weights file, by name."""
    names = ["config.json", *sorted(set(checkpoint.shard_of.values()))]
    digests = {}
    for name in names:
        with (checkpoint.folder / name).open("rb") as file:
            digest = hashlib.sha256()
            while piece := file.read(READ_AT_ONCE):
                digest.update(piece)
            digests[name] = digest.hexdigest()
    return digests
