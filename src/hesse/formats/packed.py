"""The pack-quantized layout of compressed-tensors: integers packed into words, read by transformers and vLLM."""

import math
import re
from dataclasses import replace
from typing import Any

import torch
import transformers
from compressed_tensors.compressors.pack_quantized import pack_to_int32
from torch import Tensor, nn
from transformers import integrations
from transformers.pytorch_utils import Conv1D

from hesse.constraints import Grid, GridCode, SparseGrid
from hesse.errors import OptionError
from hesse.formats.base import Format, StoredLayer
from hesse.models.network import Network

EXPERTS = r"re:.*\.experts\.\d+\..*"
# transformers reads unpacked experts beside packed layers only if some scheme of floats is there; it matches nothing.
NO_EXPERTS = {
    "targets": ["re:^no experts$"],
    "weights": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"},
}
WHOLE_COLUMN = 1 << 20  # a block height above any width: one scale for the whole column
SMALLEST_COMMON_GROUP = 32  # what the kernels of vLLM serve

# Older versions load such files without a word, and with wrong weights.
LOADER_UNPACKS = hasattr(integrations.compressed_tensors, "CompressedTensorsDequantize")

Scheme = dict[str, Any]


class PackedFormat(Format):
    """Codes of 2 to 8 bits as a little-endian bit stream in int32 words, one scale a group in the checkpoint's type.

    A group size g that does not divide a width: the width is cut into groups of gcd(g, width) where that is at least
    32, which every loader reads, and otherwise into groups of g with a narrower last one, which transformers reads.
    transformers' default way of loading refuses asymmetric grids, and the linear layers of GPT-2 and Falcon; there the
    config asks for weights to be unpacked while loading, for which all layers must share one scheme.
    """

    name = "pack-quantized"

    def __init__(self, network: Network, layers: list[StoredLayer]) -> None:
        self._cut: dict[tuple[int, tuple[int, ...]], list[str]] = {}  # (group size, widths): layers
        self._modules = {layer.name: layer.module for layer in network.layers}
        # All experts must share one scheme, so a group size must fit the widths of all their matrices.
        self._expert_widths = {layer.shape[1] for layer in layers if layer.is_expert and layer.constraint is not None}
        super().__init__(network, layers)
        self.notes += [self._note(group, widths, names) for (group, widths), names in self._cut.items()]
        self.packed = [layer for layer in self.layers.values() if _grid(layer) is not None]
        self.unpacks_while_loading = self._needs_unpacking()
        self._refuse()

    def _adapted(self, layer: StoredLayer) -> StoredLayer:
        layer = super()._adapted(layer)
        grid = _grid(layer)
        if grid is None or grid.group_size == -1:
            return layer
        widths = self._expert_widths if layer.is_expert else {layer.shape[1]}
        common = math.gcd(grid.group_size, *widths)
        if common == grid.group_size:
            return layer
        self._cut.setdefault((grid.group_size, tuple(sorted(widths))), []).append(layer.name)
        if common < SMALLEST_COMMON_GROUP:
            return layer
        cut = replace(grid, group_size=common)
        joined = layer.constraint
        return replace(layer, constraint=replace(joined, grid=cut) if isinstance(joined, SparseGrid) else cut)

    def _note(self, group: int, widths: tuple[int, ...], names: list[str]) -> str:
        common = math.gcd(group, *widths)
        width = " and ".join(map(str, widths))
        which = f"{len(names)} layers of width {width} ({names[0]} the first)"
        if common >= SMALLEST_COMMON_GROUP:
            return f"{which}: groups of {common}, since {group} does not divide {width}"
        return (
            f"{which}: the last group of a row is narrower, since {group} does not divide {width}; transformers loads "
            "that, vLLM does not"
        )

    def _needs_unpacking(self) -> bool:
        asymmetric = any(not _grid_of(layer).symmetric for layer in self.packed)
        return asymmetric or any(type(self._modules[layer.name]) is not nn.Linear for layer in self.packed)

    def _refuse(self) -> None:
        """Refuse what no loader takes."""
        if self.unpacks_while_loading and not LOADER_UNPACKS:
            raise OptionError(
                f"{self.packed[0].name}: asymmetric grids, and this architecture's layers, load from transformers 5.23 "
                f"on, and this is {transformers.__version__}: update it, or use --format dense"
            )
        experts = [layer for layer in self.packed if layer.is_expert]
        others = [layer for layer in self.packed if not layer.is_expert]
        all_experts = [layer for layer in self.layers.values() if layer.is_expert]
        for layer in experts:
            if not _grid_of(layer).symmetric:
                raise OptionError(f"{layer.name}: transformers cannot load asymmetric experts; use --symmetric")
        if experts and (len(experts) < len(all_experts) or len({str(self._scheme(e)) for e in experts}) > 1):
            raise OptionError(
                f"{experts[0].name}: transformers loads packed experts only if all experts of all blocks share one "
                "scheme; give them one rule, or --format dense"
            )
        if self.unpacks_while_loading and len({str(self._scheme(layer)) for layer in others}) > 1:
            raise OptionError(
                f"{others[0].name}: transformers loads asymmetric grids, and this architecture's layers, only if all "
                "layers share one scheme; use --symmetric and a group size that divides every width, or --format dense"
            )

    def _scheme(self, layer: StoredLayer) -> Scheme:
        """The quantisation arguments that a loader needs for a layer."""
        grid, columns = _grid_of(layer), layer.shape[1]
        scheme: Scheme = {"num_bits": grid.bits, "type": "int", "symmetric": grid.symmetric}
        if layer.transposed:
            height = WHOLE_COLUMN if grid.group_size == -1 else grid.group_size
            return {**scheme, "strategy": "block", "block_structure": [height, 1]}
        if grid.group_size == -1:
            return {**scheme, "strategy": "channel"}
        widths = self._expert_widths if layer.is_expert else {columns}
        if any(width % grid.group_size for width in widths):
            return {**scheme, "strategy": "block", "block_structure": [1, grid.group_size]}
        return {**scheme, "strategy": "group", "group_size": grid.group_size}

    def tensors(self, name: str, encoded: Any, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        layer = self.layers[name]
        if not isinstance(encoded, GridCode):
            raise OptionError(f"{name}: only quantised layers can be packed")
        grid = _grid_of(layer)
        codes, scale, zero_point = encoded.codes, encoded.scales.scale.to(grid.dtype), encoded.scales.zero_point
        if layer.transposed:
            codes, scale = codes.T, scale.T
        own = {
            f"{name}.weight_packed": pack_to_int32(codes.contiguous(), grid.bits),
            f"{name}.weight_scale": scale.contiguous(),
            f"{name}.weight_shape": torch.tensor(codes.shape),
        }
        if zero_point is not None:
            whole = zero_point.to(torch.int8)
            block = self._scheme(layer)["strategy"] == "block"
            stored = whole.T if layer.transposed else whole
            own[f"{name}.weight_zero_point"] = (
                stored.contiguous() if block else pack_to_int32(stored.contiguous(), grid.bits, packed_dim=0)
            )
        return own if bias is None else {**own, f"{name}.bias": bias}

    def stored_bits(self, name: str) -> float:
        layer = self.layers[name]
        grid, (rows, columns) = _grid_of(layer), layer.shape
        length = rows if layer.transposed else columns
        words = (columns if layer.transposed else rows) * math.ceil(length * grid.bits / 32)
        groups = rows * grid.groups(columns)
        scales = groups * torch.finfo(grid.dtype).bits
        zeros = 0
        if not grid.symmetric:
            block = self._scheme(layer)["strategy"] == "block"
            zeros = 8 * groups if block else 32 * math.ceil(rows * grid.bits / 32) * grid.groups(columns)
        return (32 * words + scales + zeros + 128) / layer.shape.numel()

    def config(self) -> dict[str, Any]:
        return {**super().config(), "quantization_config": self.quantization_config()}

    def quantization_config(self, also_ignore: tuple[str, ...] = ()) -> dict[str, Any]:
        """The `quantization_config` of config.json."""
        schemes: dict[str, list[StoredLayer]] = {}
        for layer in self.packed:
            schemes.setdefault(str(self._scheme(layer)), []).append(layer)
        groups = [self._group(layers, alone=len(schemes) == 1) for layers in schemes.values()]
        if any(layer.is_expert for layer in self.layers.values()) and not any(e.is_expert for e in self.packed):
            groups.append(NO_EXPERTS)
        config: dict[str, Any] = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
            "ignore": [*self._ignored(), *also_ignore],
        }
        return {**config, "dequantize": True} if self.unpacks_while_loading else config

    def _group(self, layers: list[StoredLayer], alone: bool) -> dict[str, Any]:
        if alone and self.network.kind == "causal-lm":
            targets = ["Linear"]
        elif all(layer.is_expert for layer in layers):
            targets = [EXPERTS]
        else:
            targets = [self._pattern(layer.name) for layer in layers if not layer.is_expert]
            targets += [EXPERTS] if any(layer.is_expert for layer in layers) else []
        return {"targets": targets, "weights": self._scheme(layers[0])}

    def _ignored(self) -> list[str]:
        """Linear layers that are not packed, in names that also match when the base model is loaded alone."""
        packed = {id(self._modules[layer.name]) for layer in self.packed}
        linear = [
            (name, module)
            for name, module in self.network.model.named_modules()
            if isinstance(module, nn.Linear | Conv1D) and id(module) not in packed
        ]
        return [name if "." not in name else self._pattern(name) for name, _ in linear]

    def _pattern(self, name: str) -> str:
        """A regular expression for a layer, with or without the name of the base model before it."""
        prefix = f"{self.network.model.base_model_prefix}."
        return rf"re:(.*\.)?{re.escape(name.removeprefix(prefix))}$"


def _grid(layer: StoredLayer) -> Grid | None:
    constraint = layer.constraint
    return (
        constraint.grid if isinstance(constraint, SparseGrid) else constraint if isinstance(constraint, Grid) else None
    )


def _grid_of(layer: StoredLayer) -> Grid:
    grid = _grid(layer)
    assert grid is not None
    return grid
