"""Check that zeroing equals slicing, which every partition must pass before it is used."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hesse.errors import HesseError, UnsupportedModelError, reason
from hesse.partitions.groups import Group, TracedGroups
from hesse.partitions.propagation import tensors
from hesse.partitions.slicing import slice_groups
from hesse.partitions.tracing import Forward, call_with

ALIGNED = 8  # hidden units of fused experts, so that the rows of their products have a multiple of 16 bytes
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}  # of the largest output; 0.1 for smaller types


def zero_groups(model: nn.Module, groups: Sequence[Group]) -> None:
    """Set the weights that produce some groups to zero, in place; a zeroed expert is still chosen by its router."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for group in groups:
            for part in group.produced:
                part.fill(tensors[part.parameter], 0)


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
