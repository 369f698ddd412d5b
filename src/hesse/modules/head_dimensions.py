"""Attention whose heads have fewer dimensions: the attention part of MoDeGPT, for torch's own attention."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from hesse.curvature import Objective
from hesse.errors import OptionError, UnsupportedModelError
from hesse.methods.strategies import STRATEGIES
from hesse.modules.group_ranking import KEEP
from hesse.modules.sites import Smaller
from hesse.networks.narrow_attention import NarrowAttention, plain_attentions, without_nested_tensors
from hesse.networks.torch_attention import SplitAttention, split_attentions
from hesse.options import setting
from hesse.scores.surgeon import root


class Moments(NamedTuple):
    """E[x̃x̃ᵀ] of what queries and keys are made of, x̃ being x and a 1, and E[zzᵀ] of what the heads give."""

    queries: Tensor  # (in + 1, in + 1)
    keys: Tensor
    outputs: Tensor  # (heads · head size, heads · head size)


@dataclass(frozen=True)
class HeadDimensions:
    """Give each head of each nn.MultiheadAttention a share `keep` of its dimensions, of queries and keys as of values.

    Queries and keys of a head become the nearest ones to its scores, E[(q·k - q'·k')²] over inputs of both that are
    taken as independent: the SVD of their product between square roots of the inputs' moments. Values become the
    directions that an SVD of the outputs' weights finds most of in the metric of the values, and the outputs' weights
    are the least-squares fit over all heads. All moments are of the dense model. Not for attention that turns queries
    and keys by their positions, as most language models' does.

    Source: MoDeGPT (Lin et al., 2024), whose queries and keys keep dimensions of their own (CR).
    """

    keep: float = setting(KEEP, "Share of a head's dimensions that stays.")

    def check(self, kinds: Sequence[str]) -> None:
        """Raise OptionError if `keep` leaves none or all of a head."""
        if not 0 < self.keep < 1:
            raise OptionError(
                f"keep is {self.keep}, but must be a share of a head's dimensions between 0 and 1, such as 0.75"
            )

    def find(self, objective: Objective, kinds: Sequence[str], training: bool, seed: int) -> "NarrowHeads":
        """Return the size that the heads of each attention get.

        Raises:
            OptionError: `keep` leaves none or all of a head.
            UnsupportedModelError: there is no such attention.
        """
        attentions = plain_attentions(objective.model)
        if not attentions:
            raise UnsupportedModelError(
                f"{type(objective.model).__name__} has no nn.MultiheadAttention of one width: for language models use "
                "what='hidden' on a checkpoint"
            )
        names = {module: name for name, module in objective.model.named_modules()}
        sizes = {attention: round(self.keep * attention.head_dim) for attention in attentions}
        for attention, size in sizes.items():
            if not 0 < size < attention.head_dim:
                raise OptionError(
                    f"keep {self.keep} of {attention.head_dim} dimensions of {names[attention]} leaves {size}"
                )
        removed = {
            f"dimensions of the heads of {names[attention]}": (attention.head_dim - size, attention.head_dim)
            for attention, size in sizes.items()
        }
        return NarrowHeads(objective, sizes, removed)

    def prune(self, heads: "NarrowHeads", kinds: Sequence[str]) -> Smaller:
        """Narrow the heads of the objective's model, in place."""
        model, moments = heads.objective.model, _moments(heads.objective, list(heads.sizes))
        for attention, size in heads.sizes.items():
            _narrow(attention, moments[attention], size)
        without_nested_tensors(model)
        return Smaller(model, heads.removed, kinds, "its heads do not fill the width of an nn.MultiheadAttention")


class NarrowHeads(NamedTuple):
    """The size that the heads of each attention get, and (removed, there were) of their dimensions by attention."""

    objective: Objective
    sizes: dict[nn.MultiheadAttention, int]
    removed: dict[str, tuple[int, int]]


def _moments(objective: Objective, attentions: list[nn.MultiheadAttention]) -> dict[nn.MultiheadAttention, Moments]:
    """The moments of each attention over all batches."""
    sums: dict[nn.Module, Tensor] = {}
    counts: dict[nn.Module, int] = {}

    def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0].detach().flatten(0, -2).double()
        sums[layer] = sums.get(layer, 0) + rows.T @ rows
        counts[layer] = counts.get(layer, 0) + len(rows)

    def note_with_one(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        note(layer, (torch.cat([inputs[0], torch.ones_like(inputs[0][..., :1])], -1),))

    with split_attentions(objective.model), torch.no_grad():
        watched: dict[nn.MultiheadAttention, tuple[nn.Module, ...]] = {}
        hooks = []
        for attention in attentions:
            assert isinstance(attention, SplitAttention)
            queries, keys, _ = attention.projections
            watched[attention] = queries, keys, attention.out_proj
            hooks += [layer.register_forward_pre_hook(note_with_one) for layer in (queries, keys)]
            hooks.append(attention.out_proj.register_forward_pre_hook(note))
        try:
            for inputs, _ in objective.batches():
                objective.outputs_once(inputs)
        finally:
            for hook in hooks:
                hook.remove()
    missed = [attention for attention, layers in watched.items() if any(layer not in sums for layer in layers)]
    if missed:
        raise UnsupportedModelError("an nn.MultiheadAttention of the model is never called: take it out")
    return {key: Moments(*(sums[layer] / counts[layer] for layer in layers)) for key, layers in watched.items()}


@torch.no_grad()
def _narrow(attention: nn.MultiheadAttention, moments: Moments, size: int) -> None:
    """Make the attention one whose heads have `size` dimensions."""
    before, reader = attention.head_dim, attention.out_proj.weight
    stacked = attention.in_proj_weight.double()
    bias = attention.in_proj_bias
    column = torch.zeros_like(stacked[:, :1]) if bias is None else bias.double()[:, None]
    heads = torch.cat([stacked, column], 1).view(3, attention.num_heads, before, -1)
    made, maps = torch.zeros(3, attention.num_heads, size, heads.shape[-1]).to(heads), []
    of_queries, of_keys = root(moments.queries), root(moments.keys)
    for head, (queries, keys, values) in enumerate(heads.transpose(0, 1)):
        for_queries, for_keys = nearest_product(queries @ of_queries, keys @ of_keys, size)
        made[0, head], made[1, head] = for_queries @ queries * math.sqrt(size / before), for_keys @ keys
        own = slice(head * before, (head + 1) * before)
        maps.append(leading_directions(reader[:, own].double(), moments.outputs[own, own], size))
        made[2, head] = maps[-1] @ values
    together: Tensor = torch.block_diag(*maps)  # type: ignore[no-untyped-call]
    seen = together @ moments.outputs
    fitted = reader.double() @ seen.T @ torch.linalg.pinv(seen @ together.T, hermitian=True)
    flat = made.flatten(0, 2)
    attention.in_proj_weight = nn.Parameter(flat[:, :-1].to(reader).contiguous())
    if bias is not None:
        attention.in_proj_bias = nn.Parameter(flat[:, -1].to(reader).contiguous())
    attention.out_proj.weight = nn.Parameter(fitted.to(reader))
    attention.out_proj.in_features = attention.num_heads * size
    NarrowAttention.convert(attention, attention.num_heads)
    attention.head_dim = size


def nearest_product(first: Tensor, second: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return S and T (rank, d) of the (S `first`)ᵀ (T `second`) that is nearest to `first`ᵀ `second`, both (d, n)."""
    left, right = (torch.linalg.qr(part.T)[1] for part in (first, second))
    directions, values, others = torch.linalg.svd(left @ right.T)
    strength = values[:rank].sqrt()[:, None]
    of_first = (strength * directions[:, :rank].T) @ torch.linalg.pinv(left.T)
    return of_first, (strength * others[:rank]) @ torch.linalg.pinv(right.T)


def leading_directions(weight: Tensor, moment: Tensor, count: int) -> Tensor:
    """Return the map (count, d) onto the directions that `weight` (out, d) gives most of, E[zzᵀ] being `moment`.

    The second moment of the map's outputs is the identity.
    """
    values, vectors = torch.linalg.eigh(moment)
    seen = values > values[-1].clamp(min=0) * 1e-12  # nothing is known of the others, and nothing lost with them
    scale = torch.where(seen, values, 0).sqrt()
    directions = torch.linalg.svd(weight @ (vectors * scale))[2][:count]
    return cast(Tensor, directions @ (vectors * torch.where(seen, 1 / scale, 0)).T)


STRATEGIES.register("head_dimensions", HeadDimensions)
