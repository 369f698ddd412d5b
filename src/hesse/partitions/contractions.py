"""Rules of products that sum over units: the readers of units, and the producers of new ones."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hesse.partitions.planes import Plane, Planes, pin_units
from hesse.partitions.propagation import Call, Propagation, PropagationRule


def contract(
    run: Propagation, left: tuple[Tensor, int], right: tuple[Tensor, int], name: str
) -> tuple[list[Plane], list[Plane]]:
    """Sum over an axis of each side: join and mark as read the units along it; return each side's other planes.

    Units that also differ along other dimensions, such as those of heads, are joined along the axis.
    """
    pure: list[list[Plane]] = []
    rest: list[list[Plane]] = []
    data = [run.is_data(tensor) for tensor, _ in (left, right)]
    for tensor, axis in (left, right):
        pure.append([])
        rest.append([])
        for plane in run.planes(tensor):
            if plane.varies() == {axis}:
                pure[-1].append(plane)
            elif axis in plane.varies():
                run.units.join(plane.units, plane.units.narrow(axis, 0, 1))
                rest[-1].extend(run.tidy([plane]))
            else:
                rest[-1].append(plane)
    size = left[0].shape[left[1]]
    for mine, other, is_data in ((pure[0], pure[1], data[0]), (pure[1], pure[0], data[1])):
        for plane in mine:
            if not other and size > 1:
                run.units.note("fixed", plane.units, run.reason(f"sums over them with a constant ({name})"))
            for partner in other:
                run.units.join(plane.units.flatten(), partner.units.flatten())
            if not is_data:
                run.units.note("read", plane.units)
            elif not plane.zero:
                run.units.note("fixed", plane.units, run.reason("reads them where they are not zero without a cause"))
    for planes, is_data in zip(rest, data, strict=True):
        for plane in planes:
            if all(data):
                run.units.note("heads", plane.units)
            if not is_data:
                run.units.note("written", plane.units)
    return rest[0], rest[1]


def _product(run: Propagation, call: Call, first: Tensor, second: Tensor) -> Planes:
    """Multiply (…, i, k) by (…, k, j)."""
    ndim = first.ndim
    left, right = contract(run, (first, ndim - 1), (second, ndim - 2), call.name)
    return run.tidy([*left, *right])


def mm(run: Propagation, call: Call) -> Sequence[Planes]:
    """Multiply two matrices."""
    first, second = call.args[-2:]
    return [_product(run, call, first, second)]


def bmm(run: Propagation, call: Call) -> Sequence[Planes]:
    """Multiply two stacks of matrices; units along the stack are joined."""
    first, second = call.args[-2:]
    for tensor, other in ((first, second), (second, first)):
        if all(0 not in p.varies() for p in run.planes(other)) and first.shape[0] > 1:
            for plane in run.planes(tensor):
                pin_units(run.units, plane, {0}, run.reason("stacks them beside a constant"))
    return [_product(run, call, first, second)]


def mv(run: Propagation, call: Call) -> Sequence[Planes]:
    """Multiply a matrix or a vector by a vector."""
    first, second = call.args[:2]
    left, _ = contract(run, (first, first.ndim - 1), (second, 0), call.name)
    return [tuple(Plane(p.units.squeeze(-1), p.zero) for p in left)]


def with_bias(product: PropagationRule, elementwise: PropagationRule) -> PropagationRule:
    """Return the rule of a product whose first argument is added to it."""

    def rule(run: Propagation, call: Call) -> Sequence[Planes]:
        bias, first, second = call.args[:3]
        (planes,) = product(run, Call(call.function, (first, second), {}, call.result))
        sum_of = torch.empty_like(call.result)
        run.put(sum_of, planes, 0)
        return elementwise(run, Call(torch.ops.aten.add.Tensor, (sum_of, bias), {}, call.result))

    return rule


def convolution(run: Propagation, call: Call) -> Sequence[Planes]:
    """Sum over channels and positions; in grouped convolutions the channels of a group are joined."""
    source, weight, bias, transposed, groups = *call.args[:3], call.args[6], call.args[8]
    ndim, out, into = source.ndim, int(transposed), 1 - int(transposed)
    for plane in run.planes(source):
        pin_units(run.units, plane, plane.varies() - {1}, run.reason("sums over positions"))
    for plane in run.planes(weight):
        if min(plane.varies()) > 1:
            run.units.note("fixed", plane.units, "the positions of a kernel stay")
    if groups == 1:
        _, made = contract(run, (source, 1), (weight, into), call.name)
    else:
        made = _grouped(run, source, weight, groups, transposed)
    made = [p for p in made if p.varies() == {0 if groups > 1 else out}]
    for plane in made:
        run.units.note("channels", plane.units)
    planes = [p.units.flatten() for p in made] + [p.units for p in run.planes(bias)]
    shaped = [Plane(p.view(1, -1, *[1] * (ndim - 2)), zero=True) for p in planes]
    return [run.tidy(shaped)]


def _grouped(run: Propagation, source: Tensor, weight: Tensor, groups: int, transposed: bool) -> list[Plane]:
    channels = [p for p in run.planes(source) if p.varies() == {1}]
    made = [p for p in run.planes(weight) if p.varies() == {0}]
    for plane in run.planes(weight):
        if plane.varies() != {0}:
            run.units.note("fixed", plane.units, run.reason("counts them within a group"))
    if transposed:
        raise run.refusal("a transposed convolution has groups")
    for plane in made:
        run.units.note("written", plane.units)
        if not channels:
            run.units.note("fixed", plane.units, run.reason("reads them group by group from a fixed width"))
        rows = plane.units.reshape(groups, -1)
        run.units.join(rows, rows[:, :1])
        for partner in channels:
            inputs = partner.units.reshape(groups, -1)
            run.units.join(inputs, inputs[:, :1])
            run.units.join(rows[:, 0], inputs[:, 0])
    return list(run.tidy(made))
