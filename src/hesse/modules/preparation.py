"""Prepare a user's network: a copy with its layers, and its loss on data that can be iterated repeatedly."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from math import isfinite
from typing import Any

from torch import Tensor, nn

from hesse.curvature import Loss, Objective
from hesse.data.batches import module_objective
from hesse.errors import DataError, OptionError, UnsupportedModelError
from hesse.finite import all_finite
from hesse.networks.module_layers import layers_of
from hesse.networks.network import Layer
from hesse.networks.torch_attention import split_attentions


@contextmanager
def copy_model(model: nn.Module) -> Iterator[tuple[nn.Module, list[Layer], list[str]]]:
    """Yield a copy of the model in eval mode, its layers, and notes on other weights.

    While inside, the projections of torch's own attention are layers.

    Raises:
        HesseError: the model has no layers, or is a single layer.
    """
    if isinstance(model, nn.Linear | nn.Conv1d | nn.Conv2d):
        raise OptionError("the model is a single layer: put it into an nn.Sequential")
    copy = deepcopy(model).eval()
    with split_attentions(copy):
        layers, notes = layers_of(copy)
        if not layers:
            raise UnsupportedModelError(f"{type(model).__name__} has no linear or convolutional layer to compress")
        yield copy, layers, notes


def stored_objective(
    model: nn.Module,
    data: Iterable[Any],
    loss: Loss | nn.Module | None,
    forward: Callable[[nn.Module, Any], Tensor] | None,
    names: Sequence[str] | None = None,
) -> Objective:
    """Return the loss of a module on data that is walked once and kept; see `module_objective`."""
    objective = module_objective(model, list(data), loss, forward, names)
    return replace(objective, data=list(objective.data))


def dense_loss(objective: Objective) -> float:
    """Return the loss of a network that is still to be changed.

    Raises:
        DataError: it is not finite.
    """
    value = objective.value()
    if not isfinite(value):
        for name, parameter in objective.named.items():
            if not all_finite(parameter.detach()):
                raise DataError(f"{name} holds NaN or infinity: the model is damaged")
        raise DataError(f"the loss is {value}: the data holds NaN or infinity, or the model overflows on it")
    return value


@contextmanager
def layers_objective(
    model: nn.Module,
    layers: Sequence[Layer],
    data: Iterable[Any],
    loss: Loss | nn.Module | None,
    forward: Callable[[nn.Module, Any], Tensor] | None,
) -> Iterator[Objective]:
    """Yield the loss as a function of the weights of `layers`; only these require gradients while inside."""
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.requires_grad_(False)
    for layer in layers:
        layer.parameter.requires_grad_()
    names = [layer.weight_name for layer in layers]
    try:
        yield stored_objective(model, data, loss, forward, names)
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before.get(name, True))
