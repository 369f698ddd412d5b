"""Replace a layer whose weight is left @ right by two smaller modules."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hesse.constraints import LowRankCode
from hesse.networks.network import Layer


class Factored(nn.Sequential):
    """Two modules in sequence, with the `weight` and `bias` of their product.

    torch's own transformer layers read the weight and bias of their layers instead of calling them.
    """

    @property
    def weight(self) -> Tensor:
        """Return the weight of the product (out, in), or (out, in, *kernel)."""
        first, second = (module.get_parameter("weight") for module in self)
        return (second.flatten(1) @ first.flatten(1)).view(len(second), *first.shape[1:])

    @property
    def bias(self) -> Tensor | None:
        """Return the bias of the second module."""
        return self[1]._parameters["bias"]


def factorize_layer(layer: Layer, code: LowRankCode) -> Factored:
    """Return the layer as Linear + Linear, or as a convolution with `rank` outputs + a convolution with kernel 1."""
    module, rank = layer.module, len(code.right)
    bias = module._parameters.get("bias")
    pair = _pair(module, rank, bias is not None)
    for new, values in zip(pair, (code.right, code.left), strict=True):
        new.weight = nn.Parameter(values.to(layer.parameter).view_as(new.get_parameter("weight")))
    if bias is not None:
        pair[1].bias = nn.Parameter(bias.detach().clone())
    return Factored(*pair).train(module.training)


def _pair(module: nn.Module, rank: int, bias: bool) -> tuple[nn.Linear, nn.Linear] | tuple[nn.Conv2d, nn.Conv2d]:
    """Return the two modules with uninitialised weights; of convolutions the first has the stride and the padding."""
    with torch.device("meta"):
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            kind: type[Any] = nn.Conv1d if isinstance(module, nn.Conv1d) else nn.Conv2d
            geometry = (module.kernel_size, module.stride, module.padding, module.dilation)
            first = kind(module.in_channels, rank, *geometry, bias=False, padding_mode=module.padding_mode)
            return first, kind(rank, module.out_channels, 1, bias=bias)
        shape = module.get_parameter("weight").shape
        outputs, inputs = shape[::-1] if isinstance(module, Conv1D) else shape
        return nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=bias)


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Replace the submodule `name` by `new`, under all names that it has."""
    old = model.get_submodule(name)
    for parent in model.modules():
        for key, child in list(parent._modules.items()):
            if child is old:
                parent._modules[key] = new
