"""Find the layers of a module whose weights are matrices, and the reasons why others are unchanged."""

from collections import Counter

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hesse.networks.network import Layer

LAYER_TYPES = (nn.Linear, nn.Conv1d, nn.Conv2d, Conv1D)
NAMES_SHOWN = 3  # names in one message


def layers_of(model: nn.Module) -> tuple[list[Layer], list[str]]:
    """Return the layers with matrices (out, in), or (out, in · kernel) of convolutions, and notes on other layers."""
    layers, notes = list[Layer](), list[str]()
    owners = Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )
    for name, module in model.named_modules():
        if not isinstance(module, LAYER_TYPES):
            continue
        reason = _refusal(module, owners)
        if reason is None:
            layers.append(Layer(name, module))
        else:
            notes.append(f"{name}: unchanged: {reason}")
    return layers, [*notes, *_other_matrices(model)]


def _refusal(module: nn.Module, owners: Counter[int]) -> str | None:
    """Return the reason why a layer cannot be treated as a matrix; None if it can."""
    weight = module._parameters.get("weight")
    if weight is None or not weight.is_floating_point():
        return "its weight is not a floating-point parameter"
    if owners[id(weight)] > 1:
        return "its weight is shared with another module"
    if isinstance(module, nn.Conv1d | nn.Conv2d) and module.groups != 1:
        return f"a convolution in {module.groups} groups is not a single matrix"
    return None


def _other_matrices(model: nn.Module) -> list[str]:
    """Return a note on matrices that are not a layer's weight; embeddings get no note."""
    names = [
        f"{name}.{key}" if name else key
        for name, module in model.named_modules()
        for key, parameter in module._parameters.items()
        if isinstance(parameter, Tensor) and parameter.ndim > 1 and not isinstance(module, (*LAYER_TYPES, nn.Embedding))
    ]
    if not names:
        return []
    return [f"{some_of(names)}: unchanged, because they are not the weight of a layer"]


def some_of(names: list[str]) -> str:
    """Return the first of `names` and the number of the others, for messages."""
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more
