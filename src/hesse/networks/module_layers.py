"""The layers of a module whose weights are matrices, and why others are left as they are."""

from collections import Counter

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hesse.networks.network import Layer

KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, Conv1D)
NAMED = 3  # names that a line has room for


def layers_of(model: nn.Module) -> tuple[list[Layer], list[str]]:
    """The layers whose weights are matrices (out, in), of a convolution (out, in · kernel), and notes on others."""
    layers, notes = list[Layer](), list[str]()
    owners = Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )
    for name, module in model.named_modules():
        if not isinstance(module, KINDS):
            continue
        reason = _refusal(module, owners)
        if reason is None:
            layers.append(Layer(name, module))
        else:
            notes.append(f"{name}: left as it is: {reason}")
    return layers, [*notes, *_others(model)]


def _refusal(module: nn.Module, owners: Counter[int]) -> str | None:
    """Why a layer cannot be changed as a matrix."""
    weight = module._parameters.get("weight")
    if weight is None or not weight.is_floating_point():
        return "its weight is no parameter of floating-point numbers"
    if owners[id(weight)] > 1:
        return "its weight is another module's too"
    if isinstance(module, nn.Conv1d | nn.Conv2d) and module.groups != 1:
        return f"a convolution in {module.groups} groups is no single matrix"
    return None


def _others(model: nn.Module) -> list[str]:
    """A note on matrices that are no layer's weight; embeddings are left alone without one."""
    left = [
        f"{name}.{key}" if name else key
        for name, module in model.named_modules()
        for key, parameter in module._parameters.items()
        if isinstance(parameter, Tensor) and parameter.ndim > 1 and not isinstance(module, (*KINDS, nn.Embedding))
    ]
    if not left:
        return []
    return [f"{some_of(left)}: left as they are, being no layer's weight"]


def some_of(names: list[str]) -> str:
    """The first of `names`, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
