"""Groups of a traced network as a partition: sums over their entries, and values spread to them."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hesse.errors import OptionError
from hesse.partitions.groups import Group, Slice
from hesse.partitions.partition import Partition, Shapes

ROLES = ("everything", "produced", "outgoing")


@dataclass(frozen=True, eq=False)
class AxisPlace:
    """Indices of one axis of a parameter, or of the matrix at `stack` of its first axis, and the group of each."""

    axis: int
    stack: int | None
    indices: Tensor
    groups: Tensor


class GroupParts(Partition):
    """Partition with one part per group of a network's parameters; slices of buffers are left out.

    A part has the group's entries of one role: "everything" that is removed with it, the "produced" entries that make
    it, or the "outgoing" weights that read its output. Groups of one site are disjoint. With "everything" groups of two
    sites may share entries: a convolution's weight has its own channels on one axis and its input's on the other.
    """

    precision = torch.float64

    def __init__(self, groups: Sequence[Group], model: nn.Module, role: str = "everything") -> None:
        if role not in ROLES:
            raise OptionError(f"there is no role {role!r} of a group's entries; there are {', '.join(ROLES)}")
        self.groups, self.model, self.role = list(groups), model, role
        parameters = dict(model.named_parameters())
        indices: dict[tuple[str, int, int | None], tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
        for number, group in enumerate(groups):
            for piece in slices_of(group, role):
                if piece.parameter in parameters:
                    entries, numbers = indices[piece.parameter, piece.axis, piece.stack]
                    entries.extend(piece.indices)
                    numbers.extend([number] * len(piece.indices))
        self._places: dict[str, list[AxisPlace]] = defaultdict(list)
        for (name, axis, stack), pair in indices.items():
            both = (torch.tensor(values, device=parameters[name].device) for values in pair)
            self._places[name].append(AxisPlace(axis, stack, *both))
        self._shapes = {name: parameters[name].shape for name in self._places}

    @property
    def kind(self) -> str:
        kinds = {group.kind for group in self.groups}
        return next(iter(kinds)) if len(kinds) == 1 else "groups"

    @property
    def count(self) -> int:
        return len(self.groups)

    @property
    def shapes(self) -> Shapes:
        return self._shapes

    @property
    def sites(self) -> dict[str, list[int]]:
        """Return the numbers of the groups of each site, in order."""
        result: dict[str, list[int]] = defaultdict(list)
        for number, group in enumerate(self.groups):
            result[group.family].append(number)
        return dict(result)

    def restricted(self, role: str) -> "GroupParts":
        return self if role == self.role else GroupParts(self.groups, self.model, role)

    def sums_of_samples(self, tensors: Mapping[str, Tensor]) -> Tensor:
        first = next(iter(tensors.values()))
        total = first.new_zeros(len(first), self.count)
        for name, tensor in tensors.items():
            for place in self._places.get(name, ()):
                matrix = tensor if place.stack is None else tensor[:, place.stack]
                kept = 1 + place.axis - (place.stack is not None)
                sums = matrix.sum([dim for dim in range(1, matrix.ndim) if dim != kept]) if matrix.ndim > 2 else matrix
                total.index_add_(1, place.groups.to(total.device), sums[:, place.indices.to(sums.device)])
        return total

    def spread(self, values: Tensor, like: Mapping[str, Tensor], other: float = 0.0) -> dict[str, Tensor]:
        result = {}
        for name, places in self._places.items():
            whole = torch.full_like(like[name], other)
            for place in places:
                matrix = whole if place.stack is None else whole[place.stack]
                indices = place.indices.to(whole.device)
                kept = place.axis - (place.stack is not None)
                shape = [-1 if dim == kept else 1 for dim in range(matrix.ndim)]
                own = values[place.groups.to(values.device)].to(whole).view(shape)
                matrix.index_copy_(kept, indices, own.expand_as(matrix.index_select(kept, indices)).contiguous())
            result[name] = whole
        return result


def slices_of(group: Group, role: str) -> tuple[Slice, ...]:
    """Return a group's slices of one role.

    The outgoing weights are those through which a group's output passes next. Up to their own layer the network is
    linear in them, while the weights that make the group have an activation behind them. An expert's outgoing weights
    are those of its last layer.
    """
    if role == "outgoing":
        return group.produced[-1:] if group.kind == "experts" else group.read
    return group.produced if role == "produced" else group.slices
