"""The layouts of compressed-tensors: integers packed into words, or in bytes; transformers and vLLM read them."""

import math
import re
from dataclasses import replace
from typing import Any, cast

import torch
import transformers
from compressed_tensors.compressors.pack_quantized import pack_to_int32
from torch import Tensor, nn
from transformers import integrations
from transformers.pytorch_utils import Conv1D

from hesse.constraints import Grid, GridCode, Grouped, SparseGrid
from hesse.errors import OptionError
from hesse.formats.base import DenseFormat, StoredLayer
from hesse.networks.families import EXPERT_REGEX, is_expert
from hesse.networks.network import CheckpointNetwork

EXPERTS = f"re:{EXPERT_REGEX}"
# transformers converts dense tensors beside packed ones, such as experts, only if its first scheme for experts is of
# floats; this one matches nothing.
NO_EXPERTS = {
    "targets": ["re:^no experts$"],
    "weights": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"},
}
WHOLE_COLUMN = 1 << 20  # a block height above any width: one scale for the whole column
SMALLEST_COMMON_GROUP = 32  # the smallest group that vLLM's kernels support

# Older versions load such files without an error and with wrong weights.
LOADER_UNPACKS = hasattr(integrations.compressed_tensors, "CompressedTensorsDequantize")

Scheme = dict[str, Any]


class PackedFormat(DenseFormat):
    """Codes of 2 to 8 bits as a little-endian bit stream in int32 words, one scale per group in the checkpoint's type.

    If a group size g does not divide a width, the groups have gcd(g, width) columns where that is at least 32, which
    every loader reads; otherwise they have g columns and the last group is narrower, which only transformers reads.
    transformers by default refuses asymmetric grids and the linear layers of GPT-2 and Falcon. For those the config
    asks the loader to unpack weights while loading, which requires one scheme for all layers. Unquantised layers are
    dense.
    """

    name = "pack-quantized"
    layout = "pack-quantized"  # compressed-tensors' name for the layout of the codes

    def __init__(self, network: CheckpointNetwork, layers: list[StoredLayer]) -> None:
        self._regrouped: dict[tuple[int, tuple[int, ...]], list[str]] = {}  # (group size, widths): layers
        self._modules = {layer.name: layer.module for layer in network.layers}
        paths = {module: path for path, module in network.model.named_modules()}
        self._paths = {name: paths[module] for name, module in self._modules.items()}  # a loader's names
        self._wide = {x.name for x in layers if not network.tensors.loads_alone(f"{x.name}.weight")}
        quantised = [layer for layer in layers if self._grid(layer) is not None and layer.name not in self._wide]
        plain = all(type(self._modules[layer.name]) is nn.Linear for layer in quantised)
        self.unpacks_while_loading = not plain or any(not self._grid_of(layer).symmetric for layer in quantised)
        # One group size must fit all experts' widths, and all other layers' widths if these share one scheme.
        self._expert_widths = {layer.shape[1] for layer in quantised if layer.is_expert}
        self._other_widths = {layer.shape[1] for layer in quantised if not layer.is_expert}
        super().__init__(network, layers)
        self.notes += [self._note(group, widths, names) for (group, widths), names in self._regrouped.items()]
        self.packed = {
            name: layer
            for name, layer in self.layers.items()
            if self._grid(layer) is not None and name not in self._wide
        }
        self.notes += self._wide_notes()
        self._check_loadable()

    def _widths(self, layer: StoredLayer) -> set[int]:
        """Return the widths of all layers that must share one scheme with `layer`."""
        if layer.is_expert:
            return self._expert_widths
        return self._other_widths if self.unpacks_while_loading else {layer.shape[1]}

    def _storable(self, layer: StoredLayer) -> StoredLayer:
        layer = super()._storable(layer)
        grid = self._grid(layer)
        if grid is None or grid.group_size == -1 or layer.name in self._wide:
            return layer
        widths = self._widths(layer)
        common = math.gcd(grid.group_size, *widths)
        if common == grid.group_size:
            return layer
        self._regrouped.setdefault((grid.group_size, tuple(sorted(widths))), []).append(layer.name)
        if common < SMALLEST_COMMON_GROUP:
            return layer
        finer, constraint = replace(cast(Grid, grid), group_size=common), layer.constraint
        return replace(
            layer, constraint=replace(constraint, grid=finer) if isinstance(constraint, SparseGrid) else finer
        )

    def _note(self, group: int, widths: tuple[int, ...], names: list[str]) -> str:
        common = math.gcd(group, *widths)
        which = f"{len(names)} layers of width {' and '.join(map(str, widths))} (first: {names[0]})"
        reason = f"since {group} does not divide {' and '.join(str(width) for width in widths if width % group)}"
        if common >= SMALLEST_COMMON_GROUP:
            return f"{which}: groups of {common}, {reason}"
        return f"{which}: the last group of a row is narrower, {reason}; transformers loads that, vLLM does not"

    def _wide_notes(self) -> list[str]:
        """Return a note on the solved layers whose codes no loader reads."""
        wide = [layer for layer in self.layers.values() if layer.name in self._wide and layer.constraint is not None]
        experts = sum(layer.is_expert for layer in wide)
        model_type = self.network.checkpoint.config.get("model_type")
        notes = []
        if experts:
            notes.append(
                f"{experts} expert matrices are stored at full width, rounded to the values of their codes: "
                f"transformers reads no packed experts of {model_type}"
            )
        if len(wide) > experts:
            first = next(layer.name for layer in wide if not layer.is_expert)
            notes.append(
                f"{len(wide) - experts} layers (first: {first}) are stored at full width, rounded to the values of "
                f"their codes: transformers reads them only as parts of larger tensors in {model_type}"
            )
        return notes

    def _check_loadable(self) -> None:
        """Raise OptionError for layers that no loader supports."""
        if self.unpacks_while_loading and not LOADER_UNPACKS:
            raise OptionError(
                f"{next(iter(self.packed))}: asymmetric grids, and the layers of GPT-2 and Falcon, load from "
                f"transformers 5.23 on, but this is {transformers.__version__}: update it, or use --format dense"
            )
        for name, layer in self.layers.items():
            if layer.input_bits is not None and (reason := self._input_refusal(layer)) is not None:
                raise OptionError(f"{name}: its inputs cannot be rounded: {reason}; leave out --input-bits")
        experts = [layer for layer in self.packed.values() if layer.is_expert]
        others = [layer for layer in self.packed.values() if not layer.is_expert]
        all_experts = [layer for layer in self.layers.values() if layer.is_expert and layer.name not in self._wide]
        for layer in experts:
            if not self._grid_of(layer).symmetric:
                raise OptionError(f"{layer.name}: transformers cannot load asymmetric experts; use --symmetric")
        if experts and (len(experts) < len(all_experts) or len({str(self._scheme(e)) for e in experts}) > 1):
            raise OptionError(
                f"{experts[0].name}: transformers loads packed experts only if all experts of all blocks share one "
                "scheme; give them one rule, or --format dense"
            )
        if self.unpacks_while_loading and len({str(self._scheme(layer)) for layer in others}) > 1:
            raise OptionError(
                f"{others[0].name}: transformers loads asymmetric grids, and the layers of GPT-2 and Falcon, only if "
                "all layers share one scheme; give them one rule, use --symmetric, or --format dense"
            )

    def _input_refusal(self, layer: StoredLayer) -> str | None:
        """Return the reason why loaders would not round a layer's inputs; None if they do."""
        if layer.name not in self.packed:
            return "loaders do that only before a quantised layer"
        if layer.is_expert:
            return "transformers keeps experts in one tensor"
        return (
            "asymmetric grids and the layers of GPT-2 and Falcon load as dense" if self.unpacks_while_loading else None
        )

    def grid(self, name: str) -> Grouped:
        """Return the grid or the table of a quantised layer."""
        return self._grid_of(self.layers[name])

    def _grid(self, layer: StoredLayer) -> Grouped | None:
        """Return the grid or the table of a layer that this format stores as codes; None for all other layers."""
        constraint = layer.constraint
        grid = constraint.grid if isinstance(constraint, SparseGrid) else constraint
        return grid if isinstance(grid, Grid) else None

    def _grid_of(self, layer: StoredLayer) -> Grouped:
        return cast(Grouped, self._grid(layer))

    def _scheme(self, layer: StoredLayer) -> Scheme:
        """Return the quantisation arguments that a loader needs for a layer."""
        grid = self._grid_of(layer)
        scheme: Scheme = {"num_bits": grid.code_bits, "type": "int", "symmetric": grid.symmetric}
        if layer.transposed:
            height = WHOLE_COLUMN if grid.group_size == -1 else grid.group_size
            return {**scheme, "strategy": "block", "block_structure": [height, 1]}
        if grid.group_size == -1:
            return {**scheme, "strategy": "channel"}
        if any(width % grid.group_size for width in self._widths(layer)):
            return {**scheme, "strategy": "block", "block_structure": [1, grid.group_size]}
        return {**scheme, "strategy": "group", "group_size": grid.group_size}

    def tensors(self, name: str, encoded: Any, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        layer = self.layers[name]
        if name not in self.packed:
            return super().tensors(name, encoded, weight, bias)
        assert isinstance(encoded, GridCode)
        grid = self._grid_of(layer)
        codes, scale, zero_point = encoded.codes, encoded.scales.scale.to(grid.dtype), encoded.scales.zero_point
        if layer.transposed:
            codes, scale = codes.T, scale.T
        tensors = {**self.codes(name, codes), f"{name}.weight_scale": scale.contiguous()}
        if zero_point is not None:
            integers = zero_point.to(torch.int8)
            block = self._scheme(layer)["strategy"] == "block"
            stored = (integers.T if layer.transposed else integers).contiguous()
            stored = stored if block else pack_to_int32(stored, grid.code_bits, packed_dim=0).contiguous()
            tensors[f"{name}.weight_zero_point"] = stored
        return tensors if bias is None else {**tensors, f"{name}.bias": bias}

    def codes(self, name: str, codes: Tensor) -> dict[str, Tensor]:
        """Return the tensors that store a layer's codes, in the file's orientation."""
        packed = pack_to_int32(codes.contiguous(), self.grid(name).code_bits).contiguous()
        return {f"{name}.weight_packed": packed, f"{name}.weight_shape": torch.tensor(codes.shape)}

    def stored(self, name: str) -> dict[str, Tensor]:
        if name not in self.packed:
            return super().stored(name)
        layer = self.layers[name]
        grid, (rows, columns) = self._grid_of(layer), layer.shape
        scale = torch.empty(rows, grid.groups(columns), dtype=grid.dtype, device="meta")
        codes = torch.empty(layer.shape, dtype=torch.int8, device="meta")
        tensors = self.stored_codes(name, codes.T if layer.transposed else codes)
        tensors[f"{name}.weight_scale"] = scale.T if layer.transposed else scale
        if not grid.symmetric:
            words = (math.ceil(rows * grid.code_bits / 32), grid.groups(columns))
            block = self._scheme(layer)["strategy"] == "block"
            like = tensors[f"{name}.weight_scale"]
            zeros = like.to(torch.int8) if block else torch.empty(words, dtype=torch.int32, device="meta")
            tensors[f"{name}.weight_zero_point"] = zeros
        return tensors

    def stored_codes(self, name: str, codes: Tensor) -> dict[str, Tensor]:
        """Return the tensors of `codes` on the meta device, in the file's orientation."""
        words = (codes.shape[0], math.ceil(codes.shape[1] * self.grid(name).code_bits / 32))
        return {
            f"{name}.weight_packed": torch.empty(words, dtype=torch.int32, device="meta"),
            f"{name}.weight_shape": torch.empty(2, dtype=torch.int64, device="meta"),
        }

    def config(self) -> dict[str, Any]:
        return {**super().config(), "quantization_config": self.quantization_config()}

    def quantization_config(self, also_ignore: tuple[str, ...] = ()) -> dict[str, Any]:
        """Return the `quantization_config` of config.json."""
        schemes: dict[str, list[StoredLayer]] = {}
        for layer in self.packed.values():
            schemes.setdefault(f"{self._scheme(layer)} {layer.input_bits}", []).append(layer)
        groups = [self._group(layers, alone=len(schemes) == 1) for layers in schemes.values()]
        if self._converts_dense():
            groups.append(NO_EXPERTS)
        if sum(any("experts" in target for target in group["targets"]) for group in groups) > 1:
            # transformers gives the routed experts the first group that speaks of experts.
            groups.sort(key=lambda group: not {EXPERTS, *NO_EXPERTS["targets"]} & set(group["targets"]))
        config: dict[str, Any] = {
            "quant_method": "compressed-tensors",
            "format": self.layout,
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
            targets = [self._pattern(self._paths[layer.name]) for layer in layers if not layer.is_expert]
            targets += [EXPERTS] if any(layer.is_expert for layer in layers) else []
        group = {"targets": targets, "weights": self._scheme(layers[0])}
        bits = layers[0].input_bits
        if bits is None:
            return group
        return {**group, "input_activations": self._inputs(bits), "format": self.layout}

    def _inputs(self, bits: int) -> Scheme:
        """Return the arguments by which a loader rounds each token's inputs."""
        return {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}

    def _ignored(self) -> list[str]:
        """Return patterns for linear layers that are not packed; they also match if the base model is loaded alone."""
        packed = {id(self._modules[name]) for name in self.packed}
        linear = [
            name
            for name, module in self.network.model.named_modules()
            if isinstance(module, nn.Linear | Conv1D) and id(module) not in packed
        ]
        # Either all experts are packed or none, and there are too many to name each.
        patterns = [EXPERTS if is_expert(name) else self._pattern(name) if "." in name else name for name in linear]
        return list(dict.fromkeys([*patterns, *(rf"re:(.*\.)?{re.escape(x)}\..*" for x in self._unread())]))

    def _converts_dense(self) -> bool:
        """True if transformers joins or splits weights that are not packed, as it does with experts."""
        tensors = self.network.tensors
        for keys in tensors.converted_weights():
            parts = [part for key in keys for part in tensors.by_key.get(key, ())]
            if not any(self.stands_alone(part.removesuffix(".weight")) for part in parts):
                return True
        return False

    def _unread(self) -> list[str]:
        """Return the modules on disk that transformers does not build, such as heads that predict further tokens."""
        tensors, built, found = self.network.tensors, set[str](), dict[str, None]()
        for name in (*self.network.sources.values(), *(name for name, _ in self.network.model.named_modules())):
            parts = name.split(".")
            built |= {".".join(parts[:length]) for length in range(1, len(parts) + 1)}
        for key in tensors.unread:
            parts = key.split(".")
            if parts[-1] == "weight" and len(tensors.checkpoint.shape(key)) > 1:
                ends = (".".join(parts[:length]) for length in range(1, len(parts)))
                found[next((end for end in ends if end not in built), key.removesuffix(".weight"))] = None
        prefix = f"{self.network.model.base_model_prefix}."
        return [name.removeprefix(prefix) for name in found]

    def _pattern(self, name: str) -> str:
        """Return a regular expression for a layer's name, with or without the base model's prefix."""
        prefix = f"{self.network.model.base_model_prefix}."
        # Anything may come before, unless the name of a layer that transformers does not build could end in it.
        lead = rf"({re.escape(prefix)})?" if self._unread() else r"(.*\.)?"
        return rf"re:{lead}{re.escape(name.removeprefix(prefix))}$"

    def stands_alone(self, name: str) -> bool:
        # transformers makes separate modules of Llama 4's experts wherever it finds a quantization config.
        return name in self.packed or self.network.tensors.becomes_modules(f"{name}.weight")


class IntegerFormat(PackedFormat):
    """Codes of 8 bits as int8, one scale per group in the checkpoint's type; unquantised layers are dense.

    Runtimes that round inputs read it. Layers of fewer bits would take the same room, so they are refused.
    """

    name = "int-quantized"
    layout = "int-quantized"

    def __init__(self, network: CheckpointNetwork, layers: list[StoredLayer]) -> None:
        super().__init__(network, layers)
        for name in self.packed:
            if (bits := self.grid(name).code_bits) != 8:
                raise OptionError(f"{name}: {self.name} stores {bits} bits in a whole byte: use --format auto")

    def codes(self, name: str, codes: Tensor) -> dict[str, Tensor]:
        return {f"{name}.weight": codes.contiguous()}

    def stored_codes(self, name: str, codes: Tensor) -> dict[str, Tensor]:
        return {f"{name}.weight": codes.contiguous()}
