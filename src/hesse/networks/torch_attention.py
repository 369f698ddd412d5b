"""torch's MultiheadAttention with layers of their own for queries, keys and values, as methods see them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hesse.networks.narrow_attention import NarrowAttention, plain_attentions, without_nested_tensors

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
WHOLE = ("in_proj_weight", "in_proj_bias")  # what torch keeps the three together as


class SplitAttention(NarrowAttention):
    """Attention that calls `q_proj`, `k_proj` and `v_proj`."""

    @property
    def projections(self) -> list[nn.Module]:
        """The three layers."""
        return [self.get_submodule(name) for name in PROJECTIONS]

    @classmethod
    def split(cls, attention: nn.MultiheadAttention) -> dict[str, nn.Parameter | None]:
        """Make `attention` one of these; what it held before by name, for `join`."""
        held = {name: attention._parameters.pop(name) for name in WHOLE}
        weight, bias = held.values()
        assert weight is not None
        for number, name in enumerate(PROJECTIONS):
            with torch.device("meta"):
                layer = nn.Linear(attention.embed_dim, attention.embed_dim, bias is not None)
            layer.weight = nn.Parameter(weight.detach().chunk(3)[number])
            if bias is not None:
                layer.bias = nn.Parameter(bias.detach().chunk(3)[number])
            attention.add_module(name, layer.train(attention.training))
        cls.narrowed(attention, attention.num_heads)
        return held

    @torch.no_grad()
    def join(self, held: dict[str, nn.Parameter | None]) -> None:
        """Be torch's own again with the layers' weights in what was `held`, unless a layer is no nn.Linear any more."""
        if not all(type(layer) is nn.Linear for layer in self.projections):
            return
        for name, whole in held.items():
            if whole is not None:
                key = name.removeprefix("in_proj_")
                whole.copy_(torch.cat([layer.get_parameter(key) for layer in self.projections]))
            self._parameters[name] = whole
        for name in PROJECTIONS:
            del self._modules[name]
        self.widened()

    def _projected(self, parts: Sequence[Tensor]) -> list[Tensor]:
        return [layer(x) for layer, x in zip(self.projections, parts, strict=True)]


def stored_as(model: nn.Module, name: str) -> str:
    """What holds the parameter `name` of a model whose attentions are split when they are not."""
    *path, projection, key = name.split(".")
    attention = ".".join(path)
    if projection in PROJECTIONS and isinstance(model.get_submodule(attention), SplitAttention):
        return f"{attention}.in_proj_{key}".removeprefix(".")
    return name


@contextmanager
def split_attentions(model: nn.Module) -> Iterator[None]:
    """The attentions of torch's own below `model` as SplitAttention, and afterwards as they were, but for the weights.

    Those whose layers were factorised meanwhile stay split.
    """
    split = [(attention, SplitAttention.split(attention)) for attention in plain_attentions(model)]
    try:
        yield
    finally:
        for attention, held in split:
            assert isinstance(attention, SplitAttention)
            attention.join(held)
        without_nested_tensors(model)
