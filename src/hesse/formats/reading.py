"""Any checkpoint that Hesse or its peers write, presented as the dense tensors it stands for."""

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from pydantic import ValidationError
from torch import Tensor

from hesse.errors import CheckpointError
from hesse.formats.low_rank import CLASS_PREFIX, TYPE_PREFIX
from hesse.formats.packed import PackedFormat
from hesse.models.checkpoint import Checkpoint, read_json

PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_global_scale")
COLUMN_ORDER = "weight_g_idx"  # written by older programs; compressed-tensors reads it no longer
TRANSPOSED_TYPES = ("gpt2", "openai-gpt")  # keep the weights of linear layers as (in, out)


def open_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`: dense, packed by compressed-tensors, in thin factors, or a mixture.

    Raises:
        CheckpointError: it is incomplete, damaged, or quantised in a way that is not known.
    """
    config = read_json(folder / "config.json")
    quantization = config.get("quantization_config")
    if quantization is None and not _is_low_rank(config):
        return Checkpoint(folder)
    if quantization is not None and quantization.get("quant_method") != "compressed-tensors":
        raise CheckpointError(
            f"{folder}/config.json has the quant_method {quantization.get('quant_method')}, which Hesse does not read: "
            "start from the dense model"
        )
    return CompressedCheckpoint(folder)


class CompressedCheckpoint(Checkpoint):
    """A checkpoint some of whose weights are packed or factorised; `read` decodes them, as float32 where factorised."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._ranks: dict[str, int] = {}
        if _is_low_rank(self.config):
            self._ranks = self.config.pop("low_rank", {})
            self.config["model_type"] = self.config["model_type"].removeprefix(TYPE_PREFIX)
            self.config["architectures"] = [a.removeprefix(CLASS_PREFIX) for a in self.config["architectures"]]
            self.config.pop("auto_map", None)
        self._schemes = _schemes(folder, self.config.get("quantization_config"))
        quantised = (name.rpartition(".") for name in self.shard_of)
        self._quantised = {layer for layer, _, part in quantised if part in ("weight_packed", "weight_scale")}
        for name in self.shard_of:
            if name.endswith(f".{COLUMN_ORDER}"):
                raise CheckpointError(
                    f"{folder} has {name}: groups of reordered columns, which Hesse does not read: "
                    "start from the dense model"
                )

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
        layer, _, part = name.rpartition(".")
        if layer in self._ranks and part == "weight":
            left, right = (factor.float() for factor in stored.values())
            product = left @ right
            return product.T.contiguous() if self.config["model_type"] in TRANSPOSED_TYPES else product
        if layer in self._quantised and part == "weight":
            return self._unpacked(layer, {full.removeprefix(f"{layer}."): tensor for full, tensor in stored.items()})
        (tensor,) = stored.values()
        return tensor

    def _unpacked(self, layer: str, parts: dict[str, Tensor]) -> Tensor:
        """The weight that the tensors of a quantised layer stand for, by compressed-tensors' own arithmetic."""
        format, scheme = self.scheme(layer)
        try:
            if format == PackedFormat.name:
                _check_words(parts, scheme)
            weight: Tensor = BaseCompressor.get_value_from_registry(format).decompress(parts, scheme)["weight"]
        except Exception as error:  # the library raises many kinds; all mean that tensors and scheme do not fit
            raise CheckpointError(
                f"{self.folder}: the weight of {layer} cannot be decoded as {format} from its {', '.join(parts)} "
                f"({_reason(error)}): copy the folder again, or start from the dense model"
            ) from None
        return weight

    def is_quantised(self, layer: str) -> bool:
        """Whether the weight of `layer` is stored as codes."""
        return layer in self._quantised

    def scheme(self, layer: str) -> tuple[str, QuantizationScheme]:
        """Format and scheme of the first target that names the layer, its pattern or any class of layers.

        Raises:
            CheckpointError: no target names it.
        """
        for target, chosen in self._schemes.items():
            if target.startswith("re:"):
                named = re.match(target[3:], layer) is not None
            else:
                named = _is_class(target) or target == layer or layer.endswith(f".{target}")
            if named:
                return chosen
        raise CheckpointError(f"{self.folder}/config.json has no scheme for {layer}, whose weight is quantised")


def _schemes(folder: Path, quantization: dict[str, Any] | None) -> dict[str, tuple[str, QuantizationScheme]]:
    """Format and scheme of each target, in the order in which compressed-tensors tries them."""
    if quantization is None:
        return {}
    if quantization.get("transform_config"):
        raise CheckpointError(
            f"{folder}/config.json has a transform_config: the weights are rotated, which Hesse does not read: "
            "start from the dense model"
        )
    try:
        config = QuantizationConfig.model_validate(quantization)
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{folder}/config.json has a quantization_config that is not known ({_reason(error)})"
        ) from None
    schemes: dict[str, tuple[str, QuantizationScheme]] = {}
    for scheme in config.config_groups.values():
        format = str(getattr(scheme.format, "value", scheme.format) or config.format)
        if format not in BaseCompressor.registered_names():
            raise CheckpointError(
                f"{folder}/config.json has the format {format}, which compressed-tensors does not decode: "
                "start from the dense model"
            )
        schemes.update({target: (format, scheme) for target in scheme.targets})
    order = sorted(schemes, key=lambda target: (_is_class(target), target.startswith("re:"), target))
    return {target: schemes[target] for target in order}


def _check_words(parts: dict[str, Tensor], scheme: QuantizationScheme) -> None:
    """Raise ValueError if the rows of packed codes have another length than their bits need.

    The library would unpack such rows without a word. Its own older versions wrote them, for widths such as 3 bits.
    """
    present = parts["weight_packed"].shape[-1]
    needed = math.ceil(int(parts["weight_shape"][-1]) * scheme.weights.num_bits / 32)
    if present != needed:
        raise ValueError(f"rows of {present} words, where {scheme.weights.num_bits} bits need {needed}")


def _is_low_rank(config: dict[str, Any]) -> bool:
    return str(config.get("model_type")).startswith(TYPE_PREFIX)


def _is_class(target: str) -> bool:
    """Whether a target is the name of a class of layers, such as Linear."""
    return target[:1].isupper() and "." not in target


def _reason(error: Exception) -> str:
    """What an error says, on one line."""
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, part['loc']))}: {part['msg']}" for part in error.errors())
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
