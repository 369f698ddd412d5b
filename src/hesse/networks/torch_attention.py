"""torch's MultiheadAttention with separate layers for queries, keys and values."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hesse.networks.narrow_attention import NarrowAttention, plain_attentions, without_nested_tensors

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
FUSED = ("in_proj_weight", "in_proj_bias")  # torch's parameters that hold the three projections


class SplitAttention(NarrowAttention):
    """MultiheadAttention that calls the layers `q_proj`, `k_proj` and `v_proj`."""

    @property
    def projections(self) -> list[nn.Module]:
        """Return the three layers."""
        return [self.get_submodule(name) for name in PROJECTIONS]

    @classmethod
    def split(cls, attention: nn.MultiheadAttention) -> dict[str, nn.Parameter | None]:
        """Convert `attention` to this class in place; return its fused parameters by name, for `join`."""
        fused = {name: attention._parameters.pop(name) for name in FUSED}
        weight, bias = fused.values()
        assert weight is not None
        for number, name in enumerate(PROJECTIONS):
            with torch.device("meta"):
                layer = nn.Linear(attention.embed_dim, attention.embed_dim, bias is not None)
            layer.weight = nn.Parameter(weight.detach().chunk(3)[number])
            if bias is not None:
                layer.bias = nn.Parameter(bias.detach().chunk(3)[number])
            attention.add_module(name, layer.train(attention.training))
        cls.convert(attention, attention.num_heads)
        return fused

    @torch.no_grad()
    def join(self, fused: dict[str, nn.Parameter | None]) -> None:
        """Convert back to torch's class with the weights in `fused`, unless a layer is no longer an nn.Linear."""
        if not all(type(layer) is nn.Linear for layer in self.projections):
            return
        for name, parameter in fused.items():
            if parameter is not None:
                key = name.removeprefix("in_proj_")
                parameter.copy_(torch.cat([layer.get_parameter(key) for layer in self.projections]))
            self._parameters[name] = parameter
        for name in PROJECTIONS:
            del self._modules[name]
        self.restore()

    def _project(self, parts: Sequence[Tensor]) -> list[Tensor]:
        return [layer(x) for layer, x in zip(self.projections, parts, strict=True)]


def stored_as(model: nn.Module, name: str) -> str:
    """Return the name, before attentions were split, of the parameter that holds the parameter `name`."""
    *path, projection, key = name.split(".")
    attention = ".".join(path)
    if projection in PROJECTIONS and isinstance(model.get_submodule(attention), SplitAttention):
        return f"{attention}.in_proj_{key}".removeprefix(".")
    return name


@contextmanager
def split_attentions(model: nn.Module) -> Iterator[None]:
    """Convert torch's own attentions below `model` to SplitAttention while inside; changes of weights remain.

    Attentions whose layers were factorised inside stay split.
    """
    split = [(attention, SplitAttention.split(attention)) for attention in plain_attentions(model)]
    try:
        yield
    finally:
        for attention, fused in split:
            assert isinstance(attention, SplitAttention)
            attention.join(fused)
        without_nested_tensors(model)
