"""Prepare a user's network: a copy with its layers, and its loss on data that can be iterated repeatedly."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

from torch import Tensor, nn

from hesse.curvature import CrossEntropy, Loss, Objective
from hesse.curvature.objective import Batch
from hesse.data.batches import pairs
from hesse.errors import OptionError, UnsupportedModelError
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


@contextmanager
def layers_objective(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Iterable[Batch],
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
        yield Objective.of(model, CrossEntropy() if loss is None else loss, pairs(batches), names, forward)
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before.get(name, True))
