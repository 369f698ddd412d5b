"""Propagate units through a network's forward pass, op by op."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hesse.errors import UnsupportedModelError
from hesse.partitions.planes import Plane, Planes, tidy_planes
from hesse.partitions.units import Axis, Units

CONSTANT, INTEGERS, DATA = 0, 1, 2  # a tensor depends on: nothing in the batch, only integers in it, or more


@dataclass(frozen=True)
class Record:
    """Units of a tensor; the tensor is referenced so that no other gets its id."""

    tensor: Tensor
    planes: Planes
    level: int


@dataclass(frozen=True)
class Call:
    """A call of an op, and its first result."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any

    @property
    def name(self) -> str:
        """Return the op's name without the overload, such as `addmm` or `add_`."""
        return str(self.function).split(".")[1]

    def argument(self, place: int, default: Any = None) -> Any:
        """Return a positional argument, or `default` if it is absent."""
        return self.args[place] if place < len(self.args) else default


class Propagation(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Mode that propagates units through all ops while it is active."""

    def __init__(
        self, model: nn.Module, rules: Mapping[str, "PropagationRule"], elementwise: "PropagationRule"
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.units = Units()
        self.rules, self.elementwise = rules, elementwise
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.names |= {
            id(buffer): f"{name}.{key}"
            for name, module in model.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
            for key, buffer in module.named_buffers(recurse=False)
        }
        self.modules = [""]
        self.rectangles: list[tuple[Plane, str]] = []
        self.records: dict[int, Record] = {}
        self.owners: dict[int, int] = {}  # the first tensor of each storage

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        inputs = [self.record(tensor) for tensor in tensors((args, kwargs))]
        labelled = any(record.planes for record in inputs)
        level = max((record.level for record in inputs), default=CONSTANT)
        if level == INTEGERS and labelled:
            level = DATA
        if level == DATA and self._decides(func, args):
            raise self.refusal(f"its computation depends on the values of its data ({func})")
        call = Call(func, args, kwargs or {}, func(*args, **(kwargs or {})))
        results = tensors(call.result)
        planes = self._rule(call)(self, call) if labelled else [()] * len(results)
        for tensor, found in zip(results, planes, strict=True):
            self._store(call, tensor, found, level)
        return call.result

    def record(self, tensor: Tensor) -> Record:
        """Return the record of a tensor; a new parameter gets unit numbers for its axes."""
        if id(tensor) not in self.records:
            planes = self.axes(tensor) if id(tensor) in self.names else ()
            self.records[id(tensor)] = Record(tensor, planes, CONSTANT)
            self.owners.setdefault(tensor.untyped_storage()._cdata, id(tensor))
        return self.records[id(tensor)]

    def axes(self, parameter: Tensor) -> Planes:
        """Return a plane for each axis of a parameter with more than one index."""
        name, planes = self.names[id(parameter)], []
        for axis, size in enumerate(parameter.shape):
            if size > 1:
                shape = [size if dim == axis else 1 for dim in range(parameter.ndim)]
                planes.append(Plane(self.units.new(Axis(name, axis, size)).view(shape), zero=True))
        return tuple(planes)

    def planes(self, tensor: Any) -> Planes:
        """Return the tidied planes of an argument; empty for a number or None."""
        if not isinstance(tensor, Tensor):
            return ()
        return self.tidy(self.record(tensor).planes)

    def tidy(self, planes: Iterable[Plane]) -> Planes:
        """Return planes with the joins made since; a unit that is alone in its plane is fixed."""
        return tidy_planes(self.units, planes, self.reason("takes it alone"))

    def put(self, tensor: Tensor, planes: Planes, level: int) -> None:
        """Record the planes and level of a tensor."""
        self.owners.setdefault(tensor.untyped_storage()._cdata, id(tensor))
        self.records[id(tensor)] = Record(tensor, planes, level)

    def is_data(self, tensor: Any) -> bool:
        """True if an argument depends on the batch."""
        return isinstance(tensor, Tensor) and self.record(tensor).level > CONSTANT

    def reason(self, what: str) -> str:
        """Return the reason why units are fixed: the running module, and its use of them."""
        return f"{self.modules[-1] or 'the model'} {what}"

    def refusal(self, what: str) -> UnsupportedModelError:
        """Return the error for a module whose groups cannot be traced."""
        return UnsupportedModelError(
            f"the groups of {self.modules[-1] or 'the model'} cannot be traced: {what}; trace modules without it"
        )

    def _rule(self, call: Call) -> "PropagationRule":
        for name in (call.name, call.name.rstrip("_")):
            if name in self.rules:
                return self.rules[name]
        if torch.Tag.pointwise in call.function.tags:  # type: ignore[attr-defined]
            return self.elementwise
        raise self.refusal(f"there is no rule for the operation {call.function}")

    def _decides(self, func: Any, args: tuple[Any, ...]) -> bool:
        """True if the op passes values, or a shape that depends on values, to the program."""
        if not {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags):
            return False
        deciding = tensors(args)
        if str(func).startswith("aten.index"):
            deciding = [t for t in tensors(args[1:]) if t.dtype in (torch.bool, torch.uint8)]
        return any(self.record(t).level == DATA for t in deciding)

    def _store(self, call: Call, tensor: Tensor, planes: Planes, level: int) -> None:
        before = self.records.get(id(tensor))
        planes = self.tidy(planes)
        if before is not None:
            base = self.owners.get(tensor.untyped_storage()._cdata) == id(tensor)
            if not base and [p.varies() for p in planes] != [p.varies() for p in before.planes]:
                raise self.refusal(f"{call.function} writes into a part of a tensor")
            level = max(level, before.level)
        self.put(tensor, planes, level)


PropagationRule = Callable[[Propagation, Call], Sequence[Planes]]


def tensors(values: Any) -> list[Tensor]:
    """Return the tensors in nested tuples, lists and dictionaries, but not those in other objects, such as caches."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, Mapping):
        return [tensor for value in values.values() for tensor in tensors(value)]
    if isinstance(values, tuple | list):
        return [tensor for value in values for tensor in tensors(value)]
    return []


@contextmanager
def named_modules(model: nn.Module, stack: list[str]) -> Iterator[None]:
    """Keep the name of the running module on top of `stack`."""
    handles = []

    def leave(*_: object) -> None:
        stack.pop()

    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: stack.append(name)))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
