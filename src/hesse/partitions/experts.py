"""Mixtures of experts, whose path depends on the data: rules for their fused parameters."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from hesse.networks.experts import LinearExperts, is_fused
from hesse.networks.families import EXPERT_LAYERS
from hesse.partitions.groups import Group, Slice
from hesse.partitions.planes import Plane
from hesse.partitions.propagation import DATA, Propagation
from hesse.partitions.units import Axis


@contextmanager
def followed_experts(model: nn.Module, run: Propagation) -> Iterator[None]:
    """Make experts propagate units, independently of the chosen expert, while `run` observes the model."""
    fused = {name: module for name, module in model.named_modules() if is_fused(module)}
    for name, module in fused.items():
        module.forward = _follower(module, run, name)
    try:
        yield
    finally:
        for module in fused.values():
            del module.forward


def _follower(module: nn.Module, run: Propagation, name: str) -> Any:
    units = run.units
    experts, hidden, inner = module.get_parameter("down_proj").shape

    def forward(states: Tensor, chosen: Tensor, weights: Tensor) -> Any:
        gates = units.new(Axis(f"{name}.gate_up_proj", 1, 2 * inner, experts))
        inputs = units.new(Axis(f"{name}.gate_up_proj", 2, hidden))
        outputs = units.new(Axis(f"{name}.down_proj", 1, hidden))
        read = units.new(Axis(f"{name}.down_proj", 2, inner, experts))
        units.join(gates[:, :inner], gates[:, inner:])
        units.join(gates[:, :inner], read)
        units.note("read", read)
        units.note("read", inputs)
        planes = run.planes(states)
        if not planes:
            units.note("fixed", inputs, run.reason("reads a fixed width"))
        for plane in planes:
            units.join(plane.units.flatten(), inputs)
        for plane in run.planes(weights):
            units.note("fixed", plane.units, run.reason("weighs experts with them"))
        with _disable_current_modes():  # only the shape of the result matters
            result = states.clone()
        run.put(result, (Plane(outputs.view(*[1] * (result.ndim - 1), -1), zero=True),), DATA)
        return result

    return forward


def expert_groups(model: nn.Module) -> list[Group]:
    """Return the experts of each mixture with its router in the same module: their weights and rows of the router."""
    found = []
    for name, module in model.named_modules():
        if not is_fused(module):
            continue
        parent = name.rpartition(".")[0]
        count = len(module.get_parameter("down_proj"))
        if count <= chosen_experts(model.get_submodule(parent)):
            continue
        rows = router_rows(model, parent, count)
        for expert in range(count if rows else 0):
            produced = (Slice(f"{name}.gate_up_proj", 0, (expert,)), Slice(f"{name}.down_proj", 0, (expert,)))
            read = tuple(Slice(row, 0, (expert,)) for row in rows)
            found.append(Group("experts", name, expert, produced, read))
    return found


def router_rows(model: nn.Module, parent: str, count: int) -> list[str]:
    """Return the parameters with a row per expert in the experts' sibling modules."""
    block = model.get_submodule(parent)
    return [
        f"{parent}.{child}.{key}"
        for child, module in block.named_children()
        if not is_fused(module)
        for key, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        if tensor.ndim and len(tensor) == count and _routes(module, count)
    ]


def _routes(module: nn.Module, count: int) -> bool:
    """True if a module is a router: it has the number of experts, or is a linear layer with one output per expert."""
    return getattr(module, "num_experts", getattr(module, "out_features", None)) == count


def chosen_experts(block: nn.Module) -> int:
    """Return the number of experts per token."""
    values = (getattr(m, key, 0) for m in block.modules() for key in ("top_k", "num_experts_per_tok"))
    return max((value for value in values if isinstance(value, int)), default=0)


def ragged_experts(model: nn.Module, removed: dict[str, Any]) -> set[str]:
    """Make linear layers of fused experts that keep unequal numbers of units; return the replaced parameters."""
    done = set()
    for name, module in list(model.named_modules()):
        cuts = removed.get(f"{name}.down_proj", {})
        if not is_fused(module) or not any(stack is not None for _, stack in cuts):
            continue
        count, _, inner = module.get_parameter("down_proj").shape
        kept = [expert for expert in range(count) if expert not in cuts.get((0, None), ())]
        lost = [cuts.get((2, expert), set()) for expert in kept]
        if len({len(indices) for indices in lost}) == 1:
            continue
        parent, _, child = name.rpartition(".")
        layers = [[i for i in range(inner) if i not in indices] for indices in lost]
        setattr(model.get_submodule(parent), child, _linear_experts(module, kept, layers))
        done |= {f"{name}.gate_up_proj", f"{name}.down_proj"}
    return done


def _linear_experts(fused: nn.Module, kept: list[int], units: list[list[int]]) -> LinearExperts:
    gate_up, down = fused.get_parameter("gate_up_proj"), fused.get_parameter("down_proj")
    result, inner = LinearExperts(fused, EXPERT_LAYERS[0]), down.shape[2]
    for place in range(len(kept), result.count):
        delattr(result, str(place))
    result.count = len(kept)
    for place, (expert, chosen) in enumerate(zip(kept, units, strict=True)):
        rows = torch.tensor(chosen, device=down.device)
        gate, up, back = gate_up[expert][rows], gate_up[expert][rows + inner], down[expert][:, rows]
        for key, weight in zip(EXPERT_LAYERS[0], (gate, up, back), strict=True):
            layer = cast(nn.Linear, result.get_submodule(f"{place}.{key}"))
            layer.weight = nn.Parameter(weight.detach().clone())
            layer.out_features, layer.in_features = weight.shape
    return result


def with_linear_experts(model: nn.Module) -> nn.Module:
    """Return `model`, or a copy with linear layers in place of fused experts: `{experts}.{number}.down_proj`."""
    if not any(is_fused(module) for module in model.modules()):
        return model
    result = deepcopy(model)
    for name, module in list(result.named_modules()):
        if is_fused(module):
            count, _, inner = module.get_parameter("down_proj").shape
            parent, _, child = name.rpartition(".")
            whole = _linear_experts(module, list(range(count)), [list(range(inner))] * count)
            setattr(result.get_submodule(parent), child, whole)
    return result
