"""Sums over the entries of each group, and each group's number spread over its entries."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hesse.partitions import Group, Slice


def produced(group: Group) -> tuple[Slice, ...]:
    """All that makes a group."""
    return group.produced


def everything(group: Group) -> tuple[Slice, ...]:
    """All that goes with a group."""
    return group.slices


def outgoing(group: Group) -> tuple[Slice, ...]:
    """The weights that a group's output goes through next: without them nothing comes of it.

    The network's outputs are linear in them as far as their own layer, where what makes a group has an activation
    behind it. An expert's are its own last ones.
    """
    return group.produced[-1:] if group.kind == "experts" else group.read


@dataclass(frozen=True, eq=False)
class GroupSums:
    """Sums over the slices that `part` picks of each of some groups of a model's parameters."""

    count: int
    places: dict[str, list[tuple[int, int | None, Tensor, Tensor]]]  # by parameter: (axis, stack, indices, groups)

    @classmethod
    def over(cls, groups: Sequence[Group], model: nn.Module, part: Callable[[Group], tuple[Slice, ...]]) -> "GroupSums":
        """The sums for parameters of `model`; slices of buffers are left out."""
        parameters = dict(model.named_parameters())
        found: dict[tuple[str, int, int | None], tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
        for number, group in enumerate(groups):
            for piece in part(group):
                if piece.parameter in parameters:
                    indices, numbers = found[piece.parameter, piece.axis, piece.stack]
                    indices.extend(piece.indices)
                    numbers.extend([number] * len(piece.indices))
        places: dict[str, list[tuple[int, int | None, Tensor, Tensor]]] = defaultdict(list)
        for (name, axis, stack), (indices, numbers) in found.items():
            device = parameters[name].device
            both = torch.tensor(indices, device=device), torch.tensor(numbers, device=device)
            places[name].append((axis, stack, *both))
        return cls(len(groups), dict(places))

    @property
    def names(self) -> list[str]:
        """The parameters that some group has a part of."""
        return list(self.places)

    def of(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Σ over each group's entries, (groups,), of tensors of the parameters' shapes."""
        return self.of_samples({name: tensor.unsqueeze(0) for name, tensor in tensors.items()})[0]

    def of_samples(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The same for tensors (samples, *shape) of some parameters: (samples, groups)."""
        samples = len(next(iter(tensors.values())))
        total = next(iter(tensors.values())).new_zeros(samples, self.count)
        for name, tensor in tensors.items():
            for axis, stack, indices, groups in self.places.get(name, ()):
                matrix = tensor if stack is None else tensor[:, stack]
                kept = 1 + axis - (stack is not None)
                sums = matrix.sum([dim for dim in range(1, matrix.ndim) if dim != kept]) if matrix.ndim > 2 else matrix
                total.index_add_(1, groups.to(total.device), sums[:, indices.to(sums.device)])
        return total

    def spread(self, values: Tensor, tensors: Mapping[str, Tensor], other: float) -> dict[str, Tensor]:
        """Each group's value (groups,) at each of its entries, and `other` elsewhere."""
        result = {}
        for name, places in self.places.items():
            full = torch.full_like(tensors[name], other)
            for axis, stack, indices, groups in places:
                matrix = full if stack is None else full[stack]
                indices = indices.to(full.device)
                kept = axis - (stack is not None)
                shape = [-1 if dim == kept else 1 for dim in range(matrix.ndim)]
                own = values[groups.to(values.device)].to(full).view(shape)
                matrix.index_copy_(kept, indices, own.expand_as(matrix.index_select(kept, indices)).contiguous())
            result[name] = full
        return result
