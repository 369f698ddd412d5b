"""Cut groups out of a network: its layers get smaller."""

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
    """A copy of `model` without `groups`: smaller parameters, and attributes and configuration that say so.

    What transformers' configuration of the model can say (one width for all layers, and so on) is said there, so that
    `save_pretrained` and `from_pretrained` work as before; `loading_problem` tells where it cannot, and the result
    lives in memory, or in torch.save, alone. Experts of one mixture that keep unequal numbers of hidden units become
    linear layers of their own.

    Raises:
        OptionError: a group is not of this model, or nothing would be left of a layer.
        UnsupportedModelError: a module whose size cannot be changed.
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
    """The tensor without some indices of some axes; of stacked ones, the same number from each matrix."""
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
    """Put a tensor wherever the one of that name is, under other names too."""
    old = _find(model, name)
    new = nn.Parameter(tensor.detach().clone(), old.requires_grad) if isinstance(old, nn.Parameter) else tensor
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for key, value in store.items():
                if value is old:
                    store[key] = new  # type: ignore[assignment]
