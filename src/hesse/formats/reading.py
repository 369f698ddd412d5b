"""Any checkpoint that Hesse or its peers write, presented as the dense tensors it stands for."""

import re
from collections.abc import Iterable
from pathlib import Path

from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from pydantic import ValidationError
from torch import Tensor

from hesse.errors import CheckpointError
from hesse.formats.low_rank import CLASS_PREFIX, TYPE_PREFIX
from hesse.models.checkpoint import Checkpoint, read_json

PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_global_scale", "weight_g_idx")


def open_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`: dense, packed by compressed-tensors, in thin factors, or a mixture.

    Raises:
        CheckpointError: it is incomplete, damaged, or quantised in a way that is not known.
    """
    config = read_json(folder / "config.json")
    quantization = config.get("quantization_config")
    if quantization is None and "low_rank" not in config:
        return Checkpoint(folder)
    if quantization is not None and quantization.get("quant_method") != "compressed-tensors":
        raise CheckpointError(
            f"{folder} is quantised by {quantization.get('quant_method')}, which Hesse does not read: "
            "start from the dense model"
        )
    return CompressedCheckpoint(folder)


class CompressedCheckpoint(Checkpoint):
    """A checkpoint some of whose weights are packed or factorised; `read` decodes them, as float32 where factorised."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._ranks: dict[str, int] = self.config.pop("low_rank", {})
        if self._ranks:
            self.config["model_type"] = self.config["model_type"].removeprefix(TYPE_PREFIX)
            self.config["architectures"] = [a.removeprefix(CLASS_PREFIX) for a in self.config["architectures"]]
            self.config.pop("auto_map", None)
        quantization = self.config.get("quantization_config") or {}
        self._format: str = quantization.get("format", "dense")
        try:
            self._schemes = [
                (group.get("targets", []), group.get("format"), QuantizationScheme.model_validate(group))
                for group in quantization.get("config_groups", {}).values()
            ]
        except (ValidationError, ValueError) as error:
            raise CheckpointError(
                f"{folder}/config.json has a quantization_config that is not known: {error}"
            ) from None
        self._quantised = {
            name.removesuffix(".weight_scale") for name in self.shard_of if name.endswith(".weight_scale")
        }

    def names(self) -> list[str]:
        names: dict[str, None] = {}
        for name in self.stored_names():
            layer, _, part = name.rpartition(".")
            thin = layer.rpartition(".")[0]
            if layer in self._quantised and part in PARTS:
                names[f"{layer}.weight"] = None
            elif thin in self._ranks:
                names[f"{thin}.{part}"] = None
            else:
                names[name] = None
        return list(names)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        wanted: dict[str, list[str]] = {}
        for name in names:
            layer, _, part = name.rpartition(".")
            if layer in self._ranks:
                wanted[name] = [f"{layer}.1.bias"] if part == "bias" else [f"{layer}.1.weight", f"{layer}.0.weight"]
            elif layer in self._quantised and part == "weight":
                stored = (f"{layer}.{p}" for p in ("weight", *PARTS))
                wanted[name] = [s for s in stored if s in self.shard_of]
            else:
                wanted[name] = [name]
        tensors = self.read_stored(dict.fromkeys(s for stored in wanted.values() for s in stored))
        return {name: self._decoded(name, {s: tensors[s] for s in stored}) for name, stored in wanted.items()}

    def _decoded(self, name: str, stored: dict[str, Tensor]) -> Tensor:
        if name in stored and len(stored) == 1:
            return stored[name]
        layer = name.rpartition(".")[0]
        if layer in self._ranks:
            values = [tensor.float() for tensor in stored.values()]
            if len(values) == 1:
                return next(iter(stored.values()))
            product = values[0] @ values[1]
            return product.T.contiguous() if self._is_transposed(layer) else product
        scheme, format = self._scheme(layer)
        local = {full.removeprefix(f"{layer}."): tensor for full, tensor in stored.items()}
        weight: Tensor = BaseCompressor.get_value_from_registry(format).decompress(local, scheme)["weight"]
        return weight

    def _is_transposed(self, layer: str) -> bool:
        """Whether the dense weight is (in, out) in this architecture."""
        return bool(self.config["model_type"] == "gpt2")

    def _scheme(self, layer: str) -> tuple[QuantizationScheme, str]:
        """The scheme whose targets name the layer, else the first that names a class of layers."""
        by_class: tuple[QuantizationScheme, str] | None = None
        for targets, format, scheme in self._schemes:
            chosen = (scheme, format or self._format)
            for target in targets:
                if target.startswith("re:"):
                    if re.match(target[3:], layer):
                        return chosen
                elif target == layer or layer.endswith(f".{target}"):
                    return chosen
                elif "." not in target:
                    by_class = by_class or chosen
        if by_class is None:
            raise CheckpointError(f"{self.folder}/config.json has no scheme for {layer}, whose weight is quantised")
        return by_class
