"""Two smaller modules in the place of a layer whose weight became left @ right."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hesse.constraints import LowRankCode
from hesse.networks.network import Layer


class Factored(nn.Sequential):
    """A layer and a second one, which a network that looks at their weight and bias instead of calling them can read.

    As torch's own transformer layers do.
    """

    @property
    def weight(self) -> Tensor:
        """What the two make together (out, in), or (out, in, *kernel)."""
        first, second = (module.get_parameter("weight") for module in self)
        return (second.flatten(1) @ first.flatten(1)).view(len(second), *first.shape[1:])

    @property
    def bias(self) -> Tensor | None:
        """The second one's."""
        bias = self[1].bias
        assert bias is None or isinstance(bias, Tensor)
        return bias


def factored(layer: Layer, code: LowRankCode) -> Factored:
    """Linear + Linear, or a convolution with `rank` outputs + one with a kernel of 1, of the layer's type."""
    module, rank = layer.module, len(code.right)
    bias = module._parameters.get("bias")
    pair = _pair(module, rank, bias is not None)
    for new, values in zip(pair, (code.right, code.left), strict=True):
        new.weight = nn.Parameter(values.to(layer.parameter).view_as(new.get_parameter("weight")))
    if bias is not None:
        pair[1].bias = nn.Parameter(bias.detach().clone())
    return Factored(*pair).train(module.training)


def _pair(module: nn.Module, rank: int, bias: bool) -> tuple[nn.Linear, nn.Linear] | tuple[nn.Conv2d, nn.Conv2d]:
    """The two, with weights of no meaning yet; only the first one of convolutions moves and pads."""
    with torch.device("meta"):
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            kind: type[Any] = nn.Conv1d if isinstance(module, nn.Conv1d) else nn.Conv2d
            how = (module.kernel_size, module.stride, module.padding, module.dilation)
            first = kind(module.in_channels, rank, *how, bias=False, padding_mode=module.padding_mode)
            return first, kind(rank, module.out_channels, 1, bias=bias)
        assert isinstance(module.weight, Tensor)
        outputs, inputs = module.weight.shape[::-1] if isinstance(module, Conv1D) else module.weight.shape
        return nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=bias)


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in the place of the submodule called `name`, wherever it has further names too."""
    old = model.get_submodule(name)
    for parent in model.modules():
        for key, child in list(parent._modules.items()):
            if child is old:
                parent._modules[key] = new
