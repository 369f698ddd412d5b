"""Sources of a model's parameters: the tensors of its checkpoint, renamed and converted as transformers does it.

Names on disk are not always names of modules: transformers renames tensors, splits or joins them, and stacks experts.
Its own transforms run here, on one block's tensors at a time.
"""

from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.quantizers.base import HfQuantizer

from hesse.checkpoints.checkpoint import Checkpoint
from hesse.errors import CheckpointError, UnsupportedModelError, reason
from hesse.networks.experts import NAMES, BatchedExperts, ExpertMatrix, expert_count, expert_parts, has_experts, unfuse

EXPERT = ".*."  # in a converter's source pattern: the number of an expert


class Names:
    """Parameters of a model that transformers builds, and the names by which it reads them from a checkpoint.

    Args:
        model: as transformers builds it, on the meta device.
        quantizer: transformers' quantizer of compressed weights, which adds conversions; None for dense weights.
    """

    def __init__(self, model: PreTrainedModel, quantizer: HfQuantizer | None = None) -> None:
        self.prefix, self.config = model.base_model_prefix, model.config
        self.mapping = get_model_conversion_mapping(model, None, quantizer)
        self.renamings = [entry for entry in self.mapping if isinstance(entry, WeightRenaming)]
        self.converters = [entry for entry in self.mapping if isinstance(entry, WeightConverter)]
        self.expected = model.state_dict()

    def place(self, key: str) -> tuple[str, str | None]:
        """Return the parameter that the stored tensor `key` fills, or the first of several, and its converter.

        The converter is given by its source pattern. A tensor that transformers does not read fills no parameter.
        """
        name, pattern = rename_source_key(key, self.renamings, self.converters, self.prefix, self.expected)
        if name not in self.expected and key in self.expected:
            name, pattern = rename_source_key(key, [], [], self.prefix, self.expected)
        return name, pattern

    def get_parameter(self, name: str) -> Tensor:
        """Return a parameter without data; transforms of transformers ask a model for its shape."""
        return cast(Tensor, self.expected[name])

    def converter(self, pattern: str) -> WeightConverter:
        """Return the converter that has a source pattern."""
        return {own: converter for converter in self.converters for own in converter.source_patterns}[pattern]

    def expert_names(self, path: str, fused: nn.Module) -> tuple[str, str, str]:
        """Return the names of an expert's gate, up and down matrices in checkpoints that hold one matrix each."""
        names = dict(zip(NAMES, NAMES, strict=True))
        for part in expert_parts(fused) if type(fused).__name__ != "JetMoeParallelExperts" else ():
            for converter in self.converters:
                leaves = _expert_leaves(converter)
                place = 1 if part.name == "up_proj" and len(leaves) == 2 else 0
                key = f"{path}.0.{leaves[place]}.weight" if leaves else path
                if leaves and self.place(key) == (f"{path}.{part.weight}", converter.source_patterns[place]):
                    names[part.name] = leaves[place]
        gate, up, down = names.values()
        return gate, up, down


@dataclass(eq=False)
class Conversion:
    """Stored tensors that one converter of transformers turns into one or several parameters."""

    target: str  # the parameter, or the first of several
    converter: WeightConverter
    keys: dict[str, list[str]]  # by source pattern, in order

    def lists(self) -> list[list[str]]:
        """Return the stored tensors of each source pattern of the converter."""
        return [self.keys.get(pattern, []) for pattern in self.converter.source_patterns]

    def all_keys(self) -> tuple[str, ...]:
        """Return the names of all stored tensors."""
        return tuple(key for keys in self.keys.values() for key in keys)

    def convert(self, tensors: dict[str, Tensor], built: Names) -> dict[str, Tensor]:
        """Return the parameters by name; `tensors` are the stored tensors by name.

        Raises:
            CheckpointError: the tensors do not fit the conversion.
        """
        converter = deepcopy(self.converter)
        for pattern, keys in self.keys.items():
            for key in keys:
                converter.add_tensor(self.target, key, pattern, tensors[key])  # type: ignore[arg-type]
        try:
            found: dict[str, Any] = converter.convert(self.target, model=built, config=built.config)
        except Exception as error:  # transformers raises many kinds
            raise CheckpointError(
                f"transformers cannot convert {self.all_keys()[0]} to {self.target}: {reason(error)}"
            ) from None
        return {name: value[0] if isinstance(value, list) else value for name, value in found.items()}

    def expert_key(self, place: ExpertMatrix) -> str | None:
        """Return the stored tensor that is one expert's matrix; None if experts are not stored one by one."""
        if not _expert_leaves(self.converter):
            return None
        return self.lists()[1 if place.rows[0] else 0][place.expert]


class Sources:
    """Every parameter and buffer of a model as a dense tensor of its checkpoint.

    A dense tensor has the name of a stored tensor, or the loader's name if it has none of its own. Experts of `model`
    become separate linear layers.

    Attributes:
        names: the name of the dense tensor of each parameter and buffer that the checkpoint holds, by its name in the
            model with separate experts; tied parameters have one.
        unread: stored tensors that no parameter or buffer comes from.

    Raises:
        CheckpointError: tensors do not fit a conversion.
        UnsupportedModelError: experts in an unknown layout.
    """

    def __init__(self, checkpoint: Checkpoint, model: PreTrainedModel) -> None:
        self.checkpoint, self.model = checkpoint, model
        names = Names(model)
        self.built = names
        stored, conversions, self.unread = self._collect(names)
        self._converted = {target: own for own in conversions for target in self._targets(own)}
        self._check_shapes(stored)
        self._check_experts(stored)
        places = unfuse(model, names.expert_names)
        fused = {place.parameter for place in places.values()}
        # A parameter that is stored under another kind of name, or only as a part of a stored tensor.
        self._other_names = {name: key for name, key in stored.items() if name in fused or _is_weight(name, key)}
        self._slices: dict[str, ExpertMatrix] = {}
        whole = {name: name if name in self._other_names else key for name, key in stored.items()}
        whole |= {name: name for name in self._converted}
        whole |= {key: key for key in self.unread}  # may be modules of their own, see _check_experts
        for name, place in places.items():
            conversion = self._converted.get(place.parameter)
            key = None if conversion is None else conversion.expert_key(place)
            if key is not None:
                whole[name] = key
            elif conversion is not None or place.parameter in stored:
                whole[name], self._slices[name] = name, place
        self._batched = tuple(f"{path}." for path, own in model.named_modules() if isinstance(own, BatchedExperts))
        built = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self.unread = [key for key in self.unread if key not in built]
        built |= {name for name, _ in model.named_buffers()}
        self.names = {name: own for name, own in whole.items() if name in built and own not in self.unread}
        self._tie()

    def _collect(self, names: Names) -> tuple[dict[str, str], list[Conversion], list[str]]:
        """Return the stored tensor of each parameter that has one, the conversions, and tensors that are not read."""
        stored: dict[str, str] = {}
        conversions: dict[str, Conversion] = {}
        unread = []
        for key in sorted(self.checkpoint.names(), key=dot_natural_key):
            name, pattern = names.place(key)
            if name not in names.expected:
                unread.append(key)
            elif pattern is None and name not in conversions:
                stored.setdefault(name, key)
            elif pattern is not None and name not in stored:
                conversion = conversions.setdefault(name, Conversion(name, names.converter(pattern), {}))
                conversion.keys.setdefault(pattern, []).append(key)
        return stored, list(conversions.values()), unread

    def _targets(self, conversion: Conversion) -> list[str]:
        """Return the parameters that a conversion gives, by running it without data."""
        if _expert_leaves(conversion.converter):
            return [conversion.target]
        empty = {}
        for key in conversion.all_keys():
            shape = self.checkpoint.dense_shape(key)
            if shape is None:
                raise CheckpointError(f"{key} is compressed, and transformers converts it: start from the dense model")
            empty[key] = torch.empty(shape, device="meta")
        found = conversion.convert(empty, self.built)
        for name, value in found.items():
            if name in self.built.expected:
                check_shape(name, value.shape, self.built.expected[name].shape)
        return list(found)

    def _check_shapes(self, stored: dict[str, str]) -> None:
        for name, parameter in self.built.expected.items():
            shape = self.checkpoint.dense_shape(stored[name]) if name in stored else None
            if shape is not None:
                check_shape(stored[name], shape, parameter.shape)

    def _check_experts(self, stored: dict[str, str]) -> None:
        """Check that the checkpoint has the matrices of all experts, before modules are made for each."""
        for path, module in self.model.named_modules():
            for part in expert_parts(module) if has_experts(module) else ():
                name, count = f"{path}.{part.weight}", expert_count(module)
                conversion = self._converted.get(name)
                lists = [] if conversion is None or not _expert_leaves(conversion.converter) else conversion.lists()
                alone = f"{path}.{count - 1}.{part.name}.weight"  # as transformers loads compressed experts of Llama 4
                missing = conversion is None and name not in stored and alone not in self.unread
                if missing or any(len(keys) != count for keys in lists):
                    raise CheckpointError(
                        f"{self.checkpoint.folder} has no tensor for {name} of {type(self.model).__name__}, or not of "
                        f"all {count} experts: the folder is incomplete"
                    )

    def _tie(self) -> None:
        tied: Any = getattr(self.model, "all_tied_weights_keys", None) or {}
        for name, original in tied.items():
            if name not in self.names and original in self.names:
                self.names[name] = self.names[original]
            elif original not in self.names and name in self.names:
                self.names[original] = self.names[name]

    def keys(self, name: str) -> tuple[str, ...]:
        """Return the names of the stored tensors that the dense tensor `name` comes from."""
        parameter = self._slices[name].parameter if name in self._slices else name
        if parameter in self._converted:
            return self._converted[parameter].all_keys()
        return (self._other_names.get(parameter, parameter),)

    def is_stored(self, name: str) -> bool:
        """True if the dense tensor `name` is a stored tensor, not a part or a conversion of others."""
        return not any(name in others for others in (self._slices, self._converted, self._other_names))

    def dtype(self, name: str) -> torch.dtype:
        """Return the type of the dense tensor `name` in the checkpoint."""
        return self.checkpoint.dtype(self.keys(name)[0])

    def shape(self, name: str) -> torch.Size | None:
        """Return the shape of a dense tensor that is stored, by the headers alone; None if they do not give it."""
        return self.checkpoint.dense_shape(name) if self.is_stored(name) else None

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read the dense tensors `names`; of the tensors that are converted one conversion is in memory at a time."""
        requested = list(names)
        direct = [name for name in requested if self.is_stored(name)]
        tensors = self.checkpoint.read(direct)
        parts: dict[str, list[str]] = {}  # by the parameter that is read whole
        for name in requested:
            if not self.is_stored(name):
                parts.setdefault(self._slices[name].parameter if name in self._slices else name, []).append(name)
        converted: dict[str, Tensor] = {}
        for parameter, members in parts.items():
            if parameter not in converted:
                converted = self._read_whole(parameter)
            value = converted[parameter]
            for name in members:
                place = self._slices.get(name)
                tensors[name] = (value if place is None else place.of(value)).clone(
                    memory_format=torch.contiguous_format
                )
        return {name: tensors[name] for name in requested}

    def _read_whole(self, parameter: str) -> dict[str, Tensor]:
        """Return a parameter as transformers fills it, and others that the same conversion gives."""
        if parameter not in self._converted:
            (key,) = self.keys(parameter)
            return {parameter: self.checkpoint.read([key])[key]}
        conversion = self._converted[parameter]
        return conversion.convert(self.checkpoint.read(conversion.all_keys()), self.built)

    # --- writing -----------------------------------------------------------------------------------------------------

    def loads_alone(self, name: str) -> bool:
        """True if transformers fills a parameter, or one expert's part of it, from a tensor `name` of its own."""
        if self.is_stored(name):
            return True
        place = self._slices.get(name)
        if place is None:
            return self.built.place(name) == (name, None)
        if self.becomes_modules(name):
            return True
        parameter, pattern = self.built.place(name)
        return parameter == place.parameter and pattern is not None and pattern.endswith(".weight")

    def converted_weights(self) -> list[tuple[str, ...]]:
        """Return the stored tensors of each conversion of weights of layers."""
        conversions = {id(own): own for own in self._converted.values()}
        return [
            own.all_keys()
            for own in conversions.values()
            if all(pattern.endswith(".weight") for pattern in own.converter.source_patterns)
        ]

    def becomes_modules(self, name: str) -> bool:
        """True if transformers makes a module of the expert's matrix `name` when it loads compressed weights."""
        return name in self._slices and name.startswith(self._batched)

    @property
    def folder(self) -> Path:
        """Return the model folder."""
        return self.checkpoint.folder

    @property
    def shard_of(self) -> dict[str, str]:
        """Return the file of each stored tensor."""
        return self.checkpoint.shard_of

    @cached_property
    def by_key(self) -> dict[str, list[str]]:
        """Return the dense tensors that come from each stored tensor."""
        found: dict[str, list[str]] = {}
        for name in dict.fromkeys(self.names.values()):
            for key in self.keys(name):
                found.setdefault(key, []).append(name)
        return found

    def join_changed(self, key: str, changed: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the stored tensors of `key`'s conversion with the dense tensors `changed` in their places.

        Raises:
            UnsupportedModelError: the conversion cannot be reversed.
        """
        name = self.by_key[key][0]
        parameter = self._slices[name].parameter if name in self._slices else name
        whole = {name: value.clone() for name, value in self._read_whole(parameter).items()}
        for name, value in changed.items():
            if name in self._slices:
                place = self._slices[name]
                place.of(whole[place.parameter]).copy_(value)
            else:
                whole[name].copy_(value)
        if parameter not in self._converted:
            return {key: whole[parameter]}
        return self._reverse(self._converted[parameter], whole)

    def _reverse(self, conversion: Conversion, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the stored tensors that `conversion` turns into `parameters`.

        A conversion of each element's position says where the element belongs; the result is checked.
        """
        keys = conversion.all_keys()
        stored = self.checkpoint.read(keys)
        flat = torch.cat([stored[key].flatten() for key in keys])
        kind = torch.int32 if len(flat) <= torch.iinfo(torch.int32).max else torch.int64
        positions = dict(zip(keys, _split(torch.arange(len(flat), dtype=kind), stored.values()), strict=True))
        for name, places in conversion.convert(positions, self.built).items():
            flat[places.flatten()] = parameters[name].flatten()
        result = dict(zip(keys, _split(flat, stored.values()), strict=True))
        again = conversion.convert(result, self.built)
        if any(not torch.equal(again[name], value) for name, value in parameters.items()):
            raise UnsupportedModelError(f"the conversion of {keys[0]} to {conversion.target} cannot be reversed")
        return result


def check_shape(name: str, found: torch.Size, expected: torch.Size) -> None:
    """Raise CheckpointError if a tensor has another shape than the config describes."""
    if found != expected:
        raise CheckpointError(
            f"{name} has shape {tuple(found)}, but config.json asks for {tuple(expected)}: "
            "config and weights do not belong together"
        )


def _is_weight(name: str, key: str) -> bool:
    """True if a parameter is the weight of a layer, but the name of its stored tensor does not say so."""
    return name.endswith(".weight") and not key.endswith(".weight")


def _split(flat: Tensor, shaped: Iterable[Tensor]) -> list[Tensor]:
    """Return the parts of `flat` in the shapes of other tensors."""
    others = list(shaped)
    parts = flat.split([other.numel() for other in others])  # type: ignore[no-untyped-call]
    return [part.view(other.shape) for part, other in zip(parts, others, strict=True)]


def _expert_leaves(converter: WeightConverter) -> Sequence[str]:
    """Return the names of the expert's matrices that a converter stacks, if it stacks and joins them and no more."""
    kinds = [type(operation) for operation in converter.operations]
    patterns = converter.source_patterns
    if not all(EXPERT in pattern and pattern.endswith(".weight") for pattern in patterns):
        return ()
    if kinds == [MergeModulelist] and len(patterns) == 1:
        return (patterns[0].split(".")[-2],)
    if kinds == [MergeModulelist, Concatenate] and len(patterns) == 2:
        return tuple(pattern.split(".")[-2] for pattern in patterns)
    return ()
