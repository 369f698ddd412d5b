"""Replace some of a layer's outputs by a low rank."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from hesse.constraints import LowRank, LowRankCode
from hesse.curvature import Gram, Objective
from hesse.errors import OptionError, UnsupportedModelError
from hesse.estimation import estimate_curvatures
from hesse.networks.factored import factorize_layer
from hesse.networks.network import Layer
from hesse.solvers import WhitenedSVD, solve

Plain = nn.Linear | nn.Conv1d | nn.Conv2d


@dataclass(frozen=True)
class Implant:
    """Share of each site's groups that are kept as a low rank, and the rank in each layer that produces them."""

    share: float
    rank: int

    def __post_init__(self) -> None:
        if not 0 < self.share < 1 or self.rank < 1:
            raise OptionError(
                f"an implant of share {self.share} and rank {self.rank}: use between 0 and 1, and 1 or more"
            )


class ImplantedLayer(nn.Module):
    """A layer with some outputs unchanged, and others through `rank` outputs of the same kind and a kernel of 1."""

    order: Tensor

    def __init__(self, whole: nn.Module, narrow: nn.Module, wide: nn.Module, order: Tensor) -> None:
        super().__init__()
        self.whole, self.narrow, self.wide = whole, narrow, wide
        self.register_buffer("order", order)

    def forward(self, values: Tensor) -> Tensor:
        """Return the layer's outputs, in their original order."""
        axis = -1 if isinstance(self.whole, nn.Linear) else 1
        both = torch.cat([self.whole(values), self.wide(self.narrow(values))], axis)
        return both.index_select(axis, self.order)


def implant(objective: Objective, rows: Mapping[str, Sequence[int]], rank: int) -> None:
    """Replace layers of the objective's model, in place: the given outputs of each get a low rank.

    A rank of at least the outputs' own changes nothing. The low rank is the best one on the layer's inputs: the SVD is
    whitened by E[xxᵀ] on the objective's data. Source: the neural implant of HAP (Yu et al., 2022,
    arXiv:2101.08940), which uses a kernel of 1 there.

    Raises:
        UnsupportedModelError: a layer is not nn.Linear, or a convolution without groups.
    """
    model = objective.model
    for name in rows:
        layer = model.get_submodule(name)
        plain = isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d) and getattr(layer, "groups", 1) == 1
        if not plain:
            raise UnsupportedModelError(
                f"{name} is {type(layer).__name__}: only linear layers and plain convolutions take an implant"
            )
    names = tuple(f"{name}.weight" for name in rows)
    chosen = Objective(model, objective.loss, objective.data, names, objective.forward)
    grams = estimate_curvatures(chosen, ["gram"]).gram
    for name, places in rows.items():
        parent, _, key = name.rpartition(".")
        made = _implanted(cast(Plain, model.get_submodule(name)), list(places), rank, grams[f"{name}.weight"])
        setattr(model.get_submodule(parent), key, made)


def _implanted(layer: Plain, places: list[int], rank: int, gram: Gram) -> ImplantedLayer:
    weight = layer.weight.detach()
    chosen = set(places)
    kept = [row for row in range(len(weight)) if row not in chosen]
    rows = weight[places].flatten(1)
    if rank >= min(rows.shape):
        code = LowRankCode(torch.eye(len(rows)).to(rows), rows)
    else:
        code = solve(rows, gram.damped(1e-6), LowRank(rank), WhitenedSVD()).encoded
    bias = None if layer.bias is None else layer.bias.detach()
    whole = _with(layer, weight[kept], None if bias is None else bias[kept])
    others = _with(layer, weight[places], None if bias is None else bias[places])
    narrow, wide = factorize_layer(Layer("", others), code)
    order = torch.tensor(kept + places, device=weight.device).argsort()
    return ImplantedLayer(whole, narrow, wide, order)


def _with(like: Plain, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """Return a layer of the kind of `like`, with other weights."""
    out, into = weight.shape[:2]
    kind: type[Any] = type(like)
    how: dict[str, Any] = {"bias": bias is not None}
    if not isinstance(like, nn.Linear):
        how |= {name: getattr(like, name) for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode")}
    with torch.device("meta"):
        layer: nn.Module = kind(into, out, **how)
    layer.weight = nn.Parameter(weight.clone())
    layer.register_parameter("bias", None if bias is None else nn.Parameter(bias.clone()))
    return layer
