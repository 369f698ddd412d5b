"""Units: disjoint sets of parameter indices that are removed together; ops join the sets."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Axis:
    """An axis of a parameter; with `stacked`, of each matrix along the parameter's first axis."""

    parameter: str
    axis: int
    size: int
    stacked: int | None = None


@dataclass
class Units:
    """Numbers of the indices of axes, and the sets that they have been joined into.

    A note about an index (that it is fixed, produced, read, ...) holds for its whole set.
    """

    axes: list[Axis] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    parents: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    notes: dict[str, list[tuple[Tensor, str]]] = field(default_factory=dict)

    def new(self, axis: Axis) -> Tensor:
        """Return new numbers for an axis's indices, (size,) or (stacked, size)."""
        start, count = len(self.parents), axis.size * (axis.stacked or 1)
        self.axes.append(axis)
        self.starts.append(start)
        numbers = np.arange(start, start + count)
        self.parents = np.concatenate([self.parents, numbers])
        flat = torch.from_numpy(numbers)
        return flat if axis.stacked is None else flat.view(axis.stacked, axis.size)

    def find(self, units: Tensor) -> Tensor:
        """Return the smallest number of each unit's set."""
        numbers = units.numpy()
        roots = self.parents[numbers]
        while not np.array_equal(above := self.parents[roots], roots):
            roots = above
        self.parents[numbers] = roots
        return torch.from_numpy(roots)

    def join(self, first: Tensor, second: Tensor) -> None:
        """Join the sets of two broadcastable tensors of numbers, entry by entry."""
        pairs = np.stack(np.broadcast_arrays(self.find(first).numpy(), self.find(second).numpy())).reshape(2, -1)
        for one, other in np.unique(pairs[:, pairs[0] != pairs[1]], axis=1).T.tolist():
            low, high = sorted((self._root(one), self._root(other)))
            self.parents[high] = low

    def _root(self, number: int) -> int:
        while (above := int(self.parents[number])) != number:
            number = above
        return number

    def note(self, kind: str, units: Tensor, reason: str = "") -> None:
        """Record a note about some units; the first reason counts."""
        self.notes.setdefault(kind, []).append((units.flatten(), reason))

    def sets_with(self, kind: str) -> dict[int, str]:
        """Return the sets with a note of this kind by their smallest number, with the reasons."""
        found: dict[int, str] = {}
        for units, reason in self.notes.get(kind, ()):
            for root in np.unique(self.find(units).numpy()).tolist():
                found.setdefault(root, reason)
        return found

    def members(self, kind: str) -> set[int]:
        """Return the indices with a note of this kind, not their sets."""
        return {number for units, _ in self.notes.get(kind, ()) for number in units.tolist()}
