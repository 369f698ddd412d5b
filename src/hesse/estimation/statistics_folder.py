"""Statistics of a model that `hesse estimate` wrote to a folder."""

from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hesse.checkpoints.checkpoint import Checkpoint
from hesse.checkpoints.files import is_plain_name, read_json
from hesse.curvature import Curvature, Diagonal, Gram, Kronecker
from hesse.data import Samples
from hesse.errors import CheckpointError, DataError
from hesse.estimation.storage import load_curvature

INDEX_FILE = "statistics.json"
OUTPUT_FACTORS_FILE = "output_factors.safetensors"
SAMPLES = {
    "data": str | None,
    "samples": int,
    "length": int,
    "seed": int,
    "bos": bool | None,
}  # the samples' entries in an index
StoredCurvature = TypeVar("StoredCurvature", bound=Curvature)


class Statistics:
    """Folder that `hesse estimate` wrote: E[g²] at each layer's outputs, and each layer's requested curvature.

    A curvature is a Gram of the inputs, Kronecker factors, or the diagonal of the Fisher; each has a file of its own.

    Raises:
        CheckpointError: `hesse estimate` did not write the folder, or its index is damaged.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / INDEX_FILE).is_file():
            raise CheckpointError(f"{folder} has no {INDEX_FILE}: give a folder that `hesse estimate` wrote")
        self.folder = folder
        self.content: dict[str, Any] = read_json(folder / INDEX_FILE)
        if not _is_index(self.content):
            raise CheckpointError(f"{folder / INDEX_FILE} is not as `hesse estimate` writes it: estimate it again")
        self._last: dict[str, tuple[str, Curvature]] = {}  # the curvature of each kind that was read last

    def check_model(self, checkpoint: Checkpoint) -> None:
        """Check that the statistics belong to a model.

        Raises:
            CheckpointError: the model's files differ from those that were estimated.
        """
        for name, digest in checkpoint.digests.items():
            if self.content["model_files"].get(name) != digest:
                raise CheckpointError(
                    f"{self.folder} is of another model than {checkpoint.folder}: {name} differs; estimate it again"
                )

    def check_samples(self, samples: Samples) -> None:
        """Check that the data has not changed since the estimation.

        Raises:
            DataError: the samples differ from those that the statistics were estimated on.
        """
        if samples.fingerprint() != self.content["samples_fingerprint"]:
            raise DataError(
                f"{samples.source} has changed since {self.folder} was estimated: estimate it again, or give --data"
            )

    def check_holds(self, kind: str) -> None:
        """Check that the folder holds a kind of curvature.

        Raises:
            CheckpointError: it does not.
        """
        if kind not in self.content["curvatures"]:
            held = self.content["curvatures"]
            raise CheckpointError(
                f"{self.folder} holds {', '.join(held)} but no {kind}: estimate it again with --curvature "
                f"{','.join([*held, kind])}"
            )

    def gram(self, layer: str, device: torch.device) -> Gram | None:
        """Return the Gram of a layer's inputs, shared by layers with the same inputs; None if no token reached it."""
        return self._curvature("gram", layer, device, Gram)

    def kronecker(self, layer: str, device: torch.device) -> Kronecker | None:
        """Return the Kronecker factors of a layer's weight, per position, in nats per token; None if there are none."""
        return self._curvature("kronecker", layer, device, Kronecker)

    def fisher(self, layer: str, device: torch.device) -> Diagonal | None:
        """Return the Fisher diagonal of a layer's weight, per sample, in nats per token; None if there is none."""
        return self._curvature("fisher", layer, device, Diagonal)

    def _curvature(
        self, kind: str, layer: str, device: torch.device, wanted: type[StoredCurvature]
    ) -> StoredCurvature | None:
        file = self.content["curvatures"].get(kind, {}).get(layer)
        if file is None:
            return None
        if self._last.get(kind, ("", None))[0] != file:
            self._last[kind] = (file, load_curvature(self.folder / file, str(device)))
        found = self._last[kind][1]
        if not isinstance(found, wanted):
            raise CheckpointError(f"{self.folder / file} holds a {type(found).__name__}, not a {wanted.__name__}")
        return found

    @cached_property
    def output_factors(self) -> dict[str, Tensor]:
        """Return each layer's output factor E[ggᵀ], in nats per token; its diagonal if there are Kronecker factors."""
        try:
            return load_file(self.folder / OUTPUT_FACTORS_FILE)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.folder / OUTPUT_FACTORS_FILE} cannot be read ({error})") from None


def _is_index(content: dict[str, Any]) -> bool:
    """True if an index has all entries that are read from it, and its files are plain names in the folder."""
    curvatures, samples = content.get("curvatures"), content.get("samples")
    return (
        isinstance(content.get("model_files"), dict)
        and isinstance(content.get("samples_fingerprint"), str)
        and isinstance(samples, dict)
        and samples.keys() == SAMPLES.keys()
        and all(isinstance(samples[key], kind) for key, kind in SAMPLES.items())
        and isinstance(curvatures, dict)
        and all(isinstance(files, dict) and all(map(is_plain_name, files.values())) for files in curvatures.values())
    )
