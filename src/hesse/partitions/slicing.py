"""Slice groups from a network, and check that this equals zeroing them, which every partition must pass."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hesse.errors import HesseError, OptionError, UnsupportedModelError, reason
from hesse.partitions.experts import ragged_experts
from hesse.partitions.groups import Group, TracedGroups
from hesse.partitions.propagation import tensors
from hesse.partitions.sizes import describe_in_config, resize_heads, resize_layers, resize_widths
from hesse.partitions.tracing import Forward, call_with

ALIGNED = 8  # hidden units of fused experts, so that the rows of their products have a multiple of 16 bytes
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}  # of the largest output; 0.1 for smaller types
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
    known = dict(model.named_parameters()) | dict(model.named_buffers())
    removed: dict[str, Removed] = defaultdict(lambda: defaultdict(set))
    for group in groups:
        for part in group.slices:
            if part.parameter not in known or max(part.indices) >= known[part.parameter].shape[part.axis]:
                raise OptionError(
                    f"{group.name} is not a group of this model: there is no such part of {part.parameter}"
                )
            removed[part.parameter][part.axis, part.stack] |= set(part.indices)
    for name, cuts in removed.items():
        for (axis, _), indices in cuts.items():
            if len(indices) == known[name].shape[axis]:
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


def zero_groups(model: nn.Module, groups: Sequence[Group]) -> None:
    """Set the weights that produce some groups to zero, in place; a zeroed expert is still chosen by its router."""
    known = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for group in groups:
            for part in group.produced:
                part.fill(known[part.parameter], 0)


def zeroed_outputs(
    model: nn.Module, groups: Sequence[Group], inputs: Any, forward: Forward | None = None
) -> list[Tensor]:
    """Return the outputs of a copy of the model with some groups zero, and router logits of removed experts at -∞."""
    copy = deepcopy(model)
    zero_groups(copy, groups)
    rows: dict[int, set[int]] = defaultdict(set)
    known = dict(copy.named_parameters())
    for group in groups:
        if group.kind == "experts":
            for part in group.read:
                if part.parameter in known:
                    rows[id(known[part.parameter])] |= set(part.indices)
    with torch.no_grad(), _Masked(rows):
        return tensors((forward or call_with)(copy.eval(), inputs))


class _Masked(TorchFunctionMode):
    """Mode in which linear layers give some outputs as -∞, by the id of their weight."""

    def __init__(self, rows: Mapping[int, set[int]]) -> None:
        super().__init__()
        self.rows = rows

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is nn.functional.linear and id(args[1]) in self.rows:
            places = torch.tensor(sorted(self.rows[id(args[1])]), device=result.device)
            result = result.index_fill(-1, places, -torch.inf)
        return result


def check_slicing(
    model: nn.Module, groups: Sequence[Group], inputs: Any, forward: Forward | None = None
) -> tuple[nn.Module, float]:
    """Slice `groups` from `model`; return the smaller model, and its difference from the model with zeroed groups.

    The difference is that of the largest entry, relative to the largest output.

    Raises:
        UnsupportedModelError: they differ by more than rounding; the groups of this network cannot be sliced.
    """
    sliced = slice_groups(model, groups).eval()
    want = zeroed_outputs(model, groups, inputs, forward)
    where = f"{groups[0].name} and {len(groups) - 1} other groups" if len(groups) > 1 else groups[0].name
    try:
        with torch.no_grad():
            found = tensors((forward or call_with)(sliced, inputs))
    except (RuntimeError, ValueError, IndexError) as error:
        if isinstance(error, HesseError):
            raise
        raise UnsupportedModelError(f"without {where} the model does not run: {reason(error)}") from None
    difference = max(_difference(f, w) for f, w in zip(found, want, strict=True))
    allowed = TOLERANCE.get(next(t.dtype for t in want if t.is_floating_point()), 0.1)
    if not difference <= allowed:
        raise UnsupportedModelError(
            f"without {where} the model gives other outputs than with them at zero, by {difference:.1e} of the "
            "largest: something in it counts on its full width, so they must stay"
        )
    return sliced, difference


def _difference(found: Tensor, want: Tensor) -> float:
    if found.shape != want.shape:
        return torch.inf
    scale = want.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return float((found - want).abs().max() / scale)


def check_groups(
    model: nn.Module, traced: TracedGroups, inputs: Any, kinds: Sequence[str], forward: Forward | None = None
) -> float:
    """Slice one group of each site (eight of fused experts) together, and return the difference from zeroing them.

    Fused products of experts need rows of 16 bytes, so that eight units fewer still work and one fewer may not.

    Raises:
        UnsupportedModelError: as `check_slicing`.
    """
    traced.of_kinds(kinds)
    tried = [
        group
        for site in traced.sites(kinds).values()
        for group in site[: 1 if site[0].produced[0].stack is None else min(ALIGNED, len(site) - 1)]
    ]
    return check_slicing(model, tried, inputs, forward)[1]
