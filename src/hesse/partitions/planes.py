"""Planes: labels of a tensor's entries with the units that they belong to."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from hesse.partitions.units import Units


@dataclass(frozen=True, eq=False)
class Plane:
    """Unit numbers that broadcast to a tensor's shape; a weight (out, in) has two planes, (out, 1) and (1, in).

    `zero` is True if the tensor's entries are zero whenever the parameters that produce their unit are zero.
    """

    units: Tensor
    zero: bool

    def varies(self) -> set[int]:
        """Return the dimensions along which entries belong to different units."""
        return {dim for dim, size in enumerate(self.units.shape) if size > 1}


Planes = tuple[Plane, ...]


def tidy(units: Units, labels: Tensor) -> Tensor:
    """Return each unit's set, with size 1 in dimensions along which nothing changes."""
    if labels.numel() == 0:
        return labels
    for dim, stride in enumerate(labels.stride()):
        if stride == 0:
            labels = labels.narrow(dim, 0, 1)
    labels = units.find(labels.contiguous())
    for dim in range(labels.ndim):
        first = labels.narrow(dim, 0, 1)
        if labels.shape[dim] > 1 and bool((labels == first).all()):
            labels = first
    return labels


def tidy_planes(units: Units, planes: Iterable[Plane], reason: str) -> Planes:
    """Return the planes with current sets; planes that share a dimension are joined, because both label its indices.

    A plane of a single unit is dropped and the unit fixed: without it nothing would remain.
    """
    result: list[Plane] = []
    for plane in planes:
        labels, zero = tidy(units, plane.units), plane.zero
        if labels.numel() == 0:
            continue
        if labels.numel() == 1:
            units.note("fixed", labels, reason)
            continue
        for other in [p for p in result if p.varies() & {d for d, size in enumerate(labels.shape) if size > 1}]:
            units.join(labels, other.units)
            shape = [max(sizes) for sizes in zip(labels.shape, other.units.shape, strict=True)]
            labels, zero = tidy(units, labels.expand(shape)), zero or other.zero
            result.remove(other)
        if labels.numel() == 1:
            units.note("fixed", labels, reason)
        else:
            result.append(Plane(labels, zero))
    return tuple(result)


def pin_units(units: Units, plane: Plane, dims: set[int], reason: str) -> bool:
    """Forbid units that differ along `dims`; return True if the plane differed along these dimensions alone.

    In that case the units are fixed; otherwise units that differ along `dims` are joined, and removed as a whole.
    """
    inside = plane.varies() & dims
    if inside and inside == plane.varies():
        units.note("fixed", plane.units, reason)
        return True
    for dim in inside:
        units.join(plane.units, plane.units.narrow(dim, 0, 1))
    return False


def align_plane(plane: Plane, ndim: int) -> Plane:
    """Return the plane of a tensor that is broadcast to `ndim` dimensions."""
    return Plane(plane.units[(None,) * (ndim - plane.units.ndim)], plane.zero)


def squeeze_plane(plane: Plane, dims: Sequence[int]) -> Plane:
    """Return the plane with some dimensions of size 1 removed."""
    return Plane(plane.units.squeeze(tuple(dims)) if dims else plane.units, plane.zero)
