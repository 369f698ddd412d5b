"""Partitions into sets of whole parameters, such as blocks or layers with their biases."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hesse.partitions.partition import Partition, Shapes


class ParameterSets(Partition):
    """Partition into sets of whole parameters; `sets` are the parameters' names of each part.

    Examples are the blocks of a network, and its layers with their biases.
    """

    def __init__(self, shapes: Shapes, sets: Sequence[Sequence[str]], kind: str = "blocks") -> None:
        self._kind, self.sets = kind, [tuple(names) for names in sets]
        self._shapes = {name: torch.Size(shapes[name]) for names in self.sets for name in names}

    @property
    def kind(self) -> str:
        return self._kind

    @property
    def count(self) -> int:
        return len(self.sets)

    @property
    def shapes(self) -> Shapes:
        return self._shapes

    def sums_of_samples(self, tensors: Mapping[str, Tensor]) -> Tensor:
        first = next(iter(tensors.values()))
        total = first.new_zeros(len(first), self.count)
        for number, names in enumerate(self.sets):
            for name in names:
                if name in tensors:
                    total[:, number] += tensors[name].flatten(1).sum(1).to(total)
        return total

    def spread(self, values: Tensor, like: Mapping[str, Tensor], other: float = 0.0) -> dict[str, Tensor]:
        return {
            name: torch.full_like(like[name], float(values[number]))
            for number, names in enumerate(self.sets)
            for name in names
        }
