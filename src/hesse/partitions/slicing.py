"""Slice groups from a network: its layers become smaller."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import cast

import torch
from torch import Tensor, nn

from hesse.errors import OptionError
from hesse.partitions.attributes import resize_heads, resize_layers, resize_widths
from hesse.partitions.experts import ragged_experts
from hesse.partitions.groups import Group
from hesse.partitions.loading import describe_in_config

Removed = dict[tuple[int, int | None], set[int]]  # by (axis, stack)


def slice_groups(model: nn.Module, groups: Sequence[Group]) -> nn.Module:
    """Return a copy of `model` without `groups`, with smaller parameters and updated attributes and configuration.

    Sizes that transformers' configuration can express (such as one width for all layers) are set there, so that
    `save_pretrained` and `from_pretrained` still work. `loading_problem` reports if it cannot; the model can then be
    kept in memory or by torch.save only. Experts of one mixture that keep unequal numbers of hidden units become
    separate linear layers.

    Raises:
        OptionError: a group belongs to another model, or a layer would lose all its groups.
        UnsupportedModelError: the size of a module cannot be changed.
    """
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    removed: dict[str, Removed] = defaultdict(lambda: defaultdict(set))
    for group in groups:
        for part in group.slices:
            if part.parameter not in tensors or max(part.indices) >= tensors[part.parameter].shape[part.axis]:
                raise OptionError(
                    f"{group.name} is not a group of this model: there is no such part of {part.parameter}"
                )
            removed[part.parameter][part.axis, part.stack] |= set(part.indices)
    for name, cuts in removed.items():
        for (axis, _), indices in cuts.items():
            if len(indices) == tensors[name].shape[axis]:
                raise OptionError(f"nothing would be left of {name}: leave at least one of its groups")
    result = deepcopy(model)
    ragged = ragged_experts(result, removed)
    for name, cuts in removed.items():
        if name not in ragged:
            _replace(result, name, _cut(_find(result, name), cuts))
    resize_layers(model, result)
    resize_widths(model, result)
    resize_heads(model, result, groups)
    describe_in_config(model, result, groups)
    return result


def _find(model: nn.Module, name: str) -> Tensor:
    parent, _, key = name.rpartition(".")
    return cast(Tensor, getattr(model.get_submodule(parent), key))


def _cut(tensor: Tensor, cuts: Mapping[tuple[int, int | None], set[int]]) -> Tensor:
    """Return the tensor without some indices of some axes; stacked matrices lose the same number each."""
    whole = cuts.get((0, None), set())
    kept = [matrix for matrix in range(len(tensor)) if matrix not in whole]
    stacked = {axis for axis, stack in cuts if stack is not None}
    for axis in stacked:
        matrices = [
            _without(tensor[matrix], axis - 1, cuts.get((axis, matrix), set())) if matrix in kept else None
            for matrix in range(len(tensor))
        ]
        shape = next(m.shape for m in matrices if m is not None)
        tensor = torch.stack([tensor.new_zeros(shape) if m is None else m for m in matrices])
    for (axis, stack), indices in cuts.items():
        if stack is None:
            tensor = _without(tensor, axis, indices)
    return tensor


def _without(tensor: Tensor, axis: int, indices: set[int]) -> Tensor:
    kept = [index for index in range(tensor.shape[axis]) if index not in indices]
    return tensor.index_select(axis, torch.tensor(kept, device=tensor.device))


def _replace(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace a tensor under all names that it has."""
    old = _find(model, name)
    new = nn.Parameter(tensor.detach().clone(), old.requires_grad) if isinstance(old, nn.Parameter) else tensor
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for key, value in store.items():
                if value is old:
                    store[key] = new  # type: ignore[assignment]
