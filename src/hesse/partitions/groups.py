"""How a network's parameters are cut into groups that can be taken out whole."""

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

    def of(self, tensor: Tensor) -> Tensor:
        """These entries of the parameter, a copy."""
        matrix = tensor if self.stack is None else tensor[self.stack]
        return matrix.index_select(self.axis - (self.stack is not None), self.places(tensor))

    def fill(self, tensor: Tensor, value: float) -> None:
        """Set these entries of the parameter."""
        matrix = tensor if self.stack is None else tensor[self.stack]
        matrix.index_fill_(self.axis - (self.stack is not None), self.places(tensor), value)

    def places(self, tensor: Tensor) -> Tensor:
        """The indices, on the device of a tensor."""
        return torch.tensor(self.indices, device=tensor.device)


@dataclass(frozen=True)
class Group:
    """Everything that makes one head, hidden unit, channel or expert, and everything that reads it.

    Without its `produced` slices (weights, biases, norms) nothing but exact zeros goes out of it, so that these and the
    `read` slices of the layers that follow can be cut off with the outputs unchanged. For an expert that holds with
    its row of the router masked: others are chosen in its place.

    `site` is the layer that it is one of the outputs of, named after the first parameter that makes it; `index` counts
    there.
    """

    kind: GroupKind
    site: str
    index: int
    produced: tuple[Slice, ...]
    read: tuple[Slice, ...]

    @property
    def name(self) -> str:
        """Such as `model.layers.0.mlp.gate_proj[17]`."""
        return f"{self.site}[{self.index}]"

    @property
    def family(self) -> str:
        """The groups that it is one of, such as `hidden units of model.layers.0.mlp.gate_proj`."""
        return f"{'hidden units' if self.kind == 'hidden' else self.kind} of {self.site}"

    @property
    def slices(self) -> tuple[Slice, ...]:
        """All that goes with it."""
        return self.produced + self.read

    def parameters(self, model: nn.Module) -> int:
        """Entries of the model's parameters that go with it, overlaps within a parameter counted once."""
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        masks: dict[str, Tensor] = {}
        for part in self.slices:
            if part.parameter in shapes:
                mask = masks.setdefault(part.parameter, torch.zeros(shapes[part.parameter], dtype=torch.bool))
                part.fill(mask, True)
        return sum(int(mask.sum()) for mask in masks.values())


@dataclass(frozen=True)
class TracedGroups:
    """The groups of a network, and why the other axes stay as they are: {"parameter, axis": reason}.

    Groups of one kind and site are disjoint; an expert's hidden units lie inside of it.
    """

    groups: tuple[Group, ...]
    fixed: dict[str, str]

    def sites(self, kinds: Sequence[str] = GROUP_KINDS) -> dict[str, list[Group]]:
        """The groups of some kinds by what they are groups of."""
        found: dict[str, list[Group]] = {}
        for group in self.groups:
            if group.kind in kinds:
                found.setdefault(group.family, []).append(group)
        return found

    def of_kinds(self, kinds: Sequence[str]) -> list[Group]:
        """The groups of some kinds.

        Raises:
            OptionError: there is no such kind, or the network has none of them.
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
            OptionError: the groups are of another model.
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
