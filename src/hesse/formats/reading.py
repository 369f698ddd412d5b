"""Read dense or compressed checkpoints, from Hesse or from other programs, as dense tensors."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from torch import Tensor

from hesse.checkpoints.checkpoint import Checkpoint
from hesse.checkpoints.files import read_json
from hesse.errors import CheckpointError
from hesse.formats.limits import check_parts, limit_blocks, one_line, packed_shape, pattern_matches
from hesse.formats.low_rank import CLASS_PREFIX, TYPE_PREFIX
from hesse.formats.packed import PackedFormat
from hesse.networks.families import family_of
from hesse.networks.network import CheckpointNetwork

PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_global_scale")
COLUMN_ORDER = "weight_g_idx"  # written by older programs; compressed-tensors no longer reads it
PATTERN = "re:"  # the prefix of a target that is a regular expression


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open the checkpoint in `folder`: dense, packed by compressed-tensors, low-rank, or a mixture.

    Raises:
        CheckpointError: it is incomplete, damaged, or quantised in an unsupported way.
    """
    config = read_json(folder / "config.json")
    quantization = config.get("quantization_config")
    if quantization is None and not _is_low_rank(config):
        return Checkpoint(folder)
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if quantization is not None and method != "compressed-tensors":
        raise CheckpointError(
            f"{folder}/config.json has the quant_method {method}, which Hesse does not read: start from the dense model"
        )
    return CompressedCheckpoint(folder)


def open_networks(model: Path, device: torch.device) -> tuple[Checkpoint, CheckpointNetwork, CheckpointNetwork]:
    """Open a dense checkpoint; return it with its network in float32 and in the type that calibration runs in.

    Raises:
        HesseError: the model is damaged, unsupported, or already compressed.
    """
    checkpoint = open_checkpoint(model)
    if type(checkpoint) is not Checkpoint:
        raise CheckpointError(f"{model} is already compressed: start from the dense model it was made from")
    dense = CheckpointNetwork(checkpoint, torch.float32, device)
    return checkpoint, dense, dense.in_dtype(_compute_dtype(checkpoint, dense, device))


def _compute_dtype(checkpoint: Checkpoint, network: CheckpointNetwork, device: torch.device) -> torch.dtype:
    """Return the weights' own type if the device multiplies it fast, else float32."""
    stored = network.tensors.dtype(f"{network.layers[0].name}.weight")
    if device.type == "cuda":
        return stored
    native = torch.cpu.get_capabilities()
    fast = stored == torch.bfloat16 and any(native.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if fast else torch.float32


class CompressedCheckpoint(Checkpoint):
    """Checkpoint with packed or factorised weights; `read` decodes them, factorised ones to float32."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._factorised: set[str] = set()
        if _is_low_rank(self.config):
            self._factorised = _pop_low_rank(folder, self.config)
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
            parent = layer.rpartition(".")[0]
            if layer in self._quantised and part in PARTS:
                names[f"{layer}.weight"] = None
            elif parent in self._factorised:
                names[f"{parent}.{part}"] = None
            else:
                names[name] = None
        return list(names)

    def dense_shape(self, name: str) -> torch.Size | None:
        layer, _, part = name.rpartition(".")
        if part == "weight" and (layer in self._quantised or layer in self._factorised):
            return None
        return super().dense_shape(f"{layer}.1.bias" if layer in self._factorised else name)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        stored_names: dict[str, list[str]] = {}
        for name in names:
            layer, _, part = name.rpartition(".")
            if layer in self._factorised:
                stored_names[name] = (
                    [f"{layer}.1.bias"] if part == "bias" else [f"{layer}.1.weight", f"{layer}.0.weight"]
                )
            elif layer in self._quantised and part == "weight":
                stored = (f"{layer}.{p}" for p in ("weight", *PARTS))
                stored_names[name] = [s for s in stored if s in self.shard_of]
            else:
                stored_names[name] = [name]
        tensors = self.read_stored(dict.fromkeys(s for stored in stored_names.values() for s in stored))
        return {name: self._decode(name, {s: tensors[s] for s in stored}) for name, stored in stored_names.items()}

    def _decode(self, name: str, stored: dict[str, Tensor]) -> Tensor:
        layer, _, part = name.rpartition(".")
        if layer in self._factorised and part == "weight":
            return self._product(layer, *stored.values())
        if layer in self._quantised and part == "weight":
            return self._decode_codes(
                layer, {full.removeprefix(f"{layer}."): tensor for full, tensor in stored.items()}
            )
        (tensor,) = stored.values()
        return tensor

    def _product(self, layer: str, left: Tensor, right: Tensor) -> Tensor:
        """Return the weight of a factorised layer: `left` (out, rank) times `right` (rank, in)."""
        try:
            product = left.float() @ right.float()
            return product.T.contiguous() if family_of(self.config["model_type"]).transposed else product
        except (RuntimeError, MemoryError) as error:  # shapes that do not fit, or a product that is too large
            raise CheckpointError(
                f"{self.folder}: the factors of {layer} cannot be multiplied ({one_line(error)}): copy the folder again"
            ) from None

    def _decode_codes(self, layer: str, parts: dict[str, Tensor]) -> Tensor:
        """Return the weight of a quantised layer, decoded from its tensors by compressed-tensors' own arithmetic."""
        format, scheme = self.scheme(layer)
        try:
            shape = check_parts(parts, scheme, packed=format == PackedFormat.name)
            decoder = BaseCompressor.get_value_from_registry(format)
            weight: Tensor = decoder.decompress(parts, limit_blocks(scheme, shape))["weight"]
        except Exception as error:  # the library raises many kinds; all mean that the tensors do not fit the scheme
            raise CheckpointError(
                f"{self.folder}: the weight of {layer} cannot be decoded as {format} from its {', '.join(parts)} "
                f"({one_line(error)}): copy the folder again, or start from the dense model"
            ) from None
        return weight

    def code_shape(self, layer: str) -> torch.Size:
        """Return the shape of a layer's codes, in the file's orientation; codes are bytes or packed into words.

        Raises:
            CheckpointError: the tensors that give the shape are missing or damaged.
        """
        if f"{layer}.weight_packed" not in self.shard_of:
            return self.shape(f"{layer}.weight")
        words = self.shape(f"{layer}.weight_packed")
        try:
            stored = self.read_stored([f"{layer}.weight_shape"])[f"{layer}.weight_shape"]
            return packed_shape(words, stored, self.scheme(layer)[1].weights.num_bits)
        except (AttributeError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self.folder}: {layer} has {one_line(error)}: copy the folder again") from None

    def is_quantised(self, layer: str) -> bool:
        """True if the weight of `layer` is stored as codes."""
        return layer in self._quantised

    def input_rounding(self, layer: str) -> Callable[[Tensor], Tensor] | None:
        """Return the rounding of `layer`'s inputs, by compressed-tensors' own arithmetic; None if they are not rounded.

        Raises:
            CheckpointError: the layer rounds inputs with stored scales, or rounds outputs; Hesse supports neither.
        """
        scheme = self.scheme(layer)[1] if self.is_quantised(layer) else None
        if scheme is None or (scheme.input_activations is None and scheme.output_activations is None):
            return None
        if scheme.output_activations is not None or scheme.input_activations.dynamic is not True:
            raise CheckpointError(
                f"{self.folder}: {layer} rounds its inputs with stored scales, or its outputs, which Hesse does not "
                "do, so it would measure another model: use a model that rounds inputs dynamically"
            )
        return partial(_round_inputs, scheme.input_activations)

    def scheme(self, layer: str) -> tuple[str, QuantizationScheme]:
        """Return the format and scheme of the first target that names or matches the layer, or is a class of layers.

        Raises:
            CheckpointError: no target selects the layer, or a pattern is not usable.
        """
        path = self.paths.get(layer, layer)  # targets name modules of the class that loads
        for target, chosen in self._schemes.items():
            if target.startswith(PATTERN):
                named = pattern_matches(self.folder, target.removeprefix(PATTERN), path)
            else:
                named = _is_class(target) or target == path or path.endswith(f".{target}")
            if named:
                return chosen
        raise CheckpointError(f"{self.folder}/config.json has no scheme for {layer}, whose weight is quantised")


def _round_inputs(arguments: QuantizationArgs, inputs: Tensor) -> Tensor:
    scale, zero_point = compute_dynamic_scales_and_zp(inputs, arguments, None)
    return cast(Tensor, fake_quantize(inputs, scale, zero_point, arguments))


def _schemes(folder: Path, quantization: dict[str, Any] | None) -> dict[str, tuple[str, QuantizationScheme]]:
    """Return the format and scheme of each target, in the order in which compressed-tensors tries them."""
    if quantization is None:
        return {}
    if quantization.get("transform_config"):
        raise CheckpointError(
            f"{folder}/config.json has a transform_config: the weights are rotated, which Hesse does not read: "
            "start from the dense model"
        )
    try:
        config = QuantizationConfig.model_validate(quantization)
    except Exception as error:  # pydantic's own, and other types from the library's checks
        raise CheckpointError(
            f"{folder}/config.json has a quantization_config that is not understood ({one_line(error)})"
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
    order = sorted(schemes, key=lambda target: (_is_class(target), target.startswith(PATTERN), target))
    return {target: schemes[target] for target in order}


def _pop_low_rank(folder: Path, config: dict[str, Any]) -> set[str]:
    """Turn `config` into that of the model before it was factorised; return the names of the factorised layers."""
    ranks, named = config.pop("low_rank", {}), config.get("architectures")
    if not isinstance(ranks, dict) or not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise CheckpointError(
            f"{folder}/config.json describes a factorised model, but lacks low_rank or architectures: copy it again"
        )
    config["model_type"] = config["model_type"].removeprefix(TYPE_PREFIX)
    config["architectures"] = [name.removeprefix(CLASS_PREFIX) for name in named]
    config.pop("auto_map", None)
    return set(ranks)


def _is_low_rank(config: dict[str, Any]) -> bool:
    return str(config.get("model_type")).startswith(TYPE_PREFIX)


def _is_class(target: str) -> bool:
    """True if a target is the name of a class of layers, such as Linear."""
    return target[:1].isupper() and "." not in target
