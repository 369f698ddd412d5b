"""MoDeGPT's other two parts, where code can be told so: attention whose heads have fewer dimensions."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hesse.curvature import Loss, Objective
from hesse.curvature.objective import Batch
from hesse.errors import OptionError, UnsupportedModelError
from hesse.modules.group_report import StructuredReport, flops_of, parameters_of
from hesse.modules.prune_groups import freeze_as, objective_of
from hesse.networks.narrow_attention import NarrowAttention, plain_attentions, without_nested_tensors
from hesse.networks.torch_attention import SplitAttention, split_attentions


class Moments(NamedTuple):
    """E[x̃x̃ᵀ] of what queries and keys are made of, x̃ being x and a 1, and E[zzᵀ] of what the heads give."""

    queries: Tensor  # (in + 1, in + 1)
    keys: Tensor
    outputs: Tensor  # (heads · head size, heads · head size)


def narrow_heads(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    keep: float = 0.75,
    loss: Loss | nn.Module | None = None,
    forward: Callable[[nn.Module, Any], Tensor] | None = None,
) -> tuple[nn.Module, StructuredReport]:
    """Give each head of each nn.MultiheadAttention a share `keep` of its dimensions; `model` stays as it is.

    Queries and keys of a head become the nearest ones to its scores, E[(q·k - q'·k')²] over inputs of both that are
    taken as independent: the SVD of their product between square roots of the inputs' moments. Values become the
    directions that an SVD of the outputs' weights finds most of in the metric of the values, and the outputs' weights
    are the least-squares fit over all heads. All moments are of the dense model. Not for attention that turns queries
    and keys by their positions, as most language models' does: `hesse narrow` is for these.

    Args:
        model: any network with torch's own attention.
        batches: (inputs, targets) pairs; walked once and kept.
        keep: the share of a head's dimensions, of queries and keys as of values.
        loss: a Loss of `hesse.curvature`, or torch's CrossEntropyLoss or MSELoss; None for cross-entropy.
        forward: `forward(model, inputs)` gives the outputs; by default `model(inputs)`.

    Returns:
        The smaller model, in eval mode, and what was done to it.

    Raises:
        OptionError: `keep` leaves none or all of a head.
        UnsupportedModelError: there is no such attention.

    Source: MoDeGPT (Lin et al., 2024), whose queries and keys keep dimensions of their own (CR).
    """
    if not 0 < keep < 1:
        raise OptionError(f"keep is {keep}, but must be a share of a head's dimensions between 0 and 1, such as 0.75")
    objective = objective_of(model, batches, loss, forward)
    narrow = objective.model
    attentions = plain_attentions(narrow)
    if not attentions:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no nn.MultiheadAttention of one width: hesse narrow is for language models"
        )
    names = {module: name for name, module in narrow.named_modules()}
    sizes, removed = {}, {}
    for attention in attentions:
        size = sizes[attention] = round(keep * attention.head_dim)
        if not 0 < size < attention.head_dim:
            raise OptionError(f"keep {keep} of {attention.head_dim} dimensions of {names[attention]} leaves {size}")
        removed[f"dimensions of the heads of {names[attention]}"] = (attention.head_dim - size, attention.head_dim)
    before = parameters_of(narrow), flops_of(objective), objective.value()
    moments = _moments(objective, attentions)
    for attention, size in sizes.items():
        _narrow(attention, moments[attention], size)
    without_nested_tensors(narrow)
    after = objective_of(narrow, objective.data, objective.loss, forward, copied=False)
    report = StructuredReport(
        method="narrow-heads",
        removed=removed,
        parameters=(before[0], parameters_of(narrow)),
        flops=(before[1], flops_of(after)),
        loss=(before[2], after.value()),
        predicted_loss_increase=None,
        difference=0.0,
        loading="its heads do not fill the width of an nn.MultiheadAttention",
    )
    freeze_as(model, narrow)
    return narrow, report


def _moments(objective: Objective, attentions: list[nn.MultiheadAttention]) -> dict[nn.MultiheadAttention, Moments]:
    """Over all batches, of each attention."""
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
    NarrowAttention.narrowed(attention, attention.num_heads)
    attention.head_dim = size


def root(moment: Tensor) -> Tensor:
    """R with R Rᵀ = `moment`."""
    values, vectors = torch.linalg.eigh(moment)
    found: Tensor = vectors * values.clamp(min=0).sqrt()
    return found


def nearest_product(first: Tensor, second: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """S and T (rank, d), (S `first`)ᵀ (T `second`) being the nearest of its rank to `first`ᵀ `second`, both (d, n)."""
    left, right = (torch.linalg.qr(part.T)[1] for part in (first, second))
    directions, values, others = torch.linalg.svd(left @ right.T)
    strength = values[:rank].sqrt()[:, None]
    of_first = (strength * directions[:, :rank].T) @ torch.linalg.pinv(left.T)
    return of_first, (strength * others[:rank]) @ torch.linalg.pinv(right.T)


def leading_directions(weight: Tensor, moment: Tensor, count: int) -> Tensor:
    """The map (count, d) onto what `weight` (out, d) gives most of, E[zzᵀ] being `moment`; E of its outputs is I."""
    values, vectors = torch.linalg.eigh(moment)
    seen = values > values[-1].clamp(min=0) * 1e-12  # nothing is known of the others, and nothing lost with them
    scale = torch.where(seen, values, 0).sqrt()
    directions = torch.linalg.svd(weight @ (vectors * scale))[2][:count]
    found: Tensor = directions @ (vectors * torch.where(seen, 1 / scale, 0)).T
    return found
