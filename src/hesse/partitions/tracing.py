"""Trace the groups of any network from one forward pass."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from hesse.curvature.objective import differentiable_twice, in_eval_mode, layer_by_layer
from hesse.partitions.experts import expert_groups, followed_experts
from hesse.partitions.groups import Group, GroupKind, Slice, TracedGroups
from hesse.partitions.planes import pin_units
from hesse.partitions.propagation import DATA, INTEGERS, Propagation, named_modules, tensors
from hesse.partitions.rules import RULES, elementwise
from hesse.partitions.units import Units

Forward = Callable[[nn.Module, Any], Any]


def call_with(model: nn.Module, inputs: Any) -> Any:
    """Call `model(**inputs)` for a mapping, `model(*inputs)` for a tuple, else `model(inputs)`."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def trace_groups(model: nn.Module, example_inputs: Any, forward: Forward | None = None) -> TracedGroups:
    """Trace the groups of `model` that can be removed without changing the outputs once they are zero.

    One forward pass of a batch of any size is observed op by op. The network's path must not depend on the values of
    activations or of floating-point inputs, except in experts in transformers' layout. An axis without removable parts
    (a residual width under a norm, an output, a vocabulary) is listed with the reason.

    Args:
        model: any network; it is in eval mode during the pass.
        example_inputs: a tensor; a tuple or mapping of arguments.
        forward: `forward(model, inputs)` in place of the usual call.

    Raises:
        UnsupportedModelError: an operation is not supported, or the path depends on the data; it names the module.
    """
    run = Propagation(model, RULES, elementwise)
    for tensor in tensors(example_inputs):
        run.put(tensor, (), DATA if tensor.is_floating_point() else INTEGERS)
    with (
        in_eval_mode(model),
        torch.no_grad(),
        layer_by_layer(),
        differentiable_twice(),
        named_modules(model, run.modules),
        followed_experts(model, run),
        run,
    ):
        outputs = (forward or call_with)(model, example_inputs)
    for tensor in tensors(outputs):
        for plane in run.planes(tensor):
            run.units.note("fixed", plane.units, "they are an output of the model")
    for plane, why in run.rectangles:
        for left in run.tidy([plane]):
            pin_units(run.units, left, set(sorted(left.varies())[1:]), why)
    return _partition(model, run.units)


def _partition(model: nn.Module, units: Units) -> TracedGroups:
    """Return the sets of units as groups, or as fixed axes."""
    numbers = torch.arange(len(units.parents))
    roots = units.find(numbers).tolist()
    members: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))  # root: {axis number: offsets}
    for number, axis in enumerate(units.axes):
        start = units.starts[number]
        for offset in range(axis.size * (axis.stacked or 1)):
            members[roots[start + offset]][number].append(offset)
    fixed, heads, channels = units.sets_with("fixed"), units.sets_with("heads"), units.sets_with("channels")
    readers = units.members("read") - units.members("written")
    groups: dict[tuple[Any, ...], list[Group]] = defaultdict(list)
    why: dict[str, str] = {}
    for root, parts in members.items():
        produced: list[Slice] = []
        read: list[Slice] = []
        problem = fixed.get(root)
        for number, offsets in parts.items():
            axis = units.axes[number]
            stacks = {offset // axis.size for offset in offsets} if axis.stacked else {None}
            for stack in stacks:
                own = tuple(o % axis.size for o in offsets if stack is None or o // axis.size == stack)
                if len(own) == axis.size:
                    problem = problem or f"nothing would be left of {axis.parameter}"
                part = Slice(axis.parameter, axis.axis, own, stack)
                (read if units.starts[number] + offsets[0] in readers else produced).append(part)
        if problem is None and not produced:
            problem = "nothing in the model makes them"
        if problem is not None:
            why |= {f"{p.parameter}, axis {p.axis}": problem for p in (*produced, *read) if p.parameter}
            continue
        kind: GroupKind = "heads" if root in heads else "channels" if root in channels else "hidden"
        key = (kind, *((p.parameter, p.axis, p.stack) for p in (*produced, *read)))
        site = produced[0].parameter.rpartition(".")[0] + ("" if produced[0].stack is None else f".{produced[0].stack}")
        groups[key].append(Group(kind, site, len(groups[key]), tuple(produced), tuple(read)))
    found = [group for site in groups.values() for group in site]
    met = {axis.parameter for axis in units.axes}
    unused = {
        name: "no part of the forward pass"
        for name, p in model.named_parameters(remove_duplicate=False)
        if name not in met
    }
    traced = TracedGroups((*found, *expert_groups(model)), why | unused)
    traced.check(model)
    return traced
