"""Groups: parts of a network's parameters that can be removed together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from hesse.errors import OptionError

GroupKind = Literal["heads", "hidden", "channels", "experts"]
GROUP_KINDS: tuple[GroupKind, ...] = ("heads", "hidden", "channels", "experts")


@dataclass(frozen=True)
class Slice:
    """Some indices of an axis of a parameter, or of the matrix that it holds at `stack` of its first axis."""

    parameter: str
    axis: int
    indices: tuple[int, ...]
    stack: int | None = None

    def fill(self, tensor: Tensor, value: float) -> None:
        """Set these entries of the parameter to a value."""
        matrix, places = tensor if self.stack is None else tensor[self.stack], torch.tensor(self.indices)
        matrix.index_fill_(self.axis - (self.stack is not None), places.to(tensor.device), value)


@dataclass(frozen=True)
class Group:
    """All parameters that produce one head, hidden unit, channel or expert, and all that read it.

    If its `produced` slices (weights, biases, norms) are zero, its output is exactly zero, so that these and the `read`
    slices of the following layers can be removed without changing the network's outputs. For an expert this holds with
    its row of the router masked: other experts are chosen instead.

    `site` is the layer whose output it belongs to, named after the first parameter that produces it; `index` is its
    number there.
    """

    kind: GroupKind
    site: str
    index: int
    produced: tuple[Slice, ...]
    read: tuple[Slice, ...]

    @property
    def name(self) -> str:
        """Return a name such as `model.layers.0.mlp.gate_proj[17]`."""
        return f"{self.site}[{self.index}]"

    @property
    def family(self) -> str:
        """Return the name of its set of groups, such as `hidden units of model.layers.0.mlp.gate_proj`."""
        return f"{'hidden units' if self.kind == 'hidden' else self.kind} of {self.site}"

    @property
    def slices(self) -> tuple[Slice, ...]:
        """Return all slices that are removed with it."""
        return self.produced + self.read

    def parameters(self, model: nn.Module) -> int:
        """Return the number of parameters that are removed with it; overlaps within a parameter count once."""
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        masks: dict[str, Tensor] = {}
        for part in self.slices:
            if part.parameter in shapes:
                mask = masks.setdefault(part.parameter, torch.zeros(shapes[part.parameter], dtype=torch.bool))
                part.fill(mask, True)
        return sum(int(mask.sum()) for mask in masks.values())


@dataclass(frozen=True)
class TracedGroups:
    """Groups of a network, and the reasons why other axes are fixed: {"parameter, axis": reason}.

    Groups of one kind and site are disjoint; an expert's hidden units are part of the expert's group.
    """

    groups: tuple[Group, ...]
    fixed: dict[str, str]

    def sites(self, kinds: Sequence[str] = GROUP_KINDS) -> dict[str, list[Group]]:
        """Return the groups of some kinds by site."""
        found: dict[str, list[Group]] = {}
        for group in self.groups:
            if group.kind in kinds:
                found.setdefault(group.family, []).append(group)
        return found

    def of_kinds(self, kinds: Sequence[str]) -> list[Group]:
        """Return the groups of some kinds.

        Raises:
            OptionError: there is no such kind, or the network has no such groups.
        """
        if unknown := set(kinds) - set(GROUP_KINDS):
            raise OptionError(
                f"there are no groups called {', '.join(sorted(unknown))}; there are {', '.join(GROUP_KINDS)}"
            )
        found = [group for group in self.groups if group.kind in kinds]
        if not found:
            why = "; ".join(sorted(set(self.fixed.values()))[:3])
            raise OptionError(f"the network has no {' or '.join(kinds)} that can be taken out: {why or 'it has none'}")
        return found

    def check(self, model: nn.Module) -> None:
        """Check that no index is in two groups of one kind, and that the model has all indices.

        Raises:
            OptionError: the groups belong to another model.
        """
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        seen: set[tuple[str, str, int, int | None, int]] = set()
        for group in self.groups:
            for part in group.slices:
                tensor = tensors.get(part.parameter)
                if tensor is None or max(part.indices) >= tensor.shape[part.axis]:
                    raise OptionError(f"{group.name} is a group of another model: there is no such {part.parameter}")
                entries = {(group.kind, part.parameter, part.axis, part.stack, index) for index in part.indices}
                if entries & seen:
                    raise OptionError(f"{group.name} shares {part.parameter} with another group")
                seen |= entries
