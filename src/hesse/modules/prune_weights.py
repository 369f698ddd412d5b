"""All weights of a network judged together by a score, and the lowest removed."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hesse.constraints import Sparse
from hesse.curvature import GaussNewton, Loss, Objective
from hesse.curvature.objective import Batch
from hesse.errors import OptionError
from hesse.layerwise.report import LayerReport
from hesse.layerwise.rules import check_patterns
from hesse.methods.recipe import matches
from hesse.modules.preparation import copied, objective_of
from hesse.modules.report import ModuleReport
from hesse.networks.network import Layer
from hesse.passes.per_sample import Kind
from hesse.scores.attack import Attack
from hesse.scores.weights import SCORES, Judgement, ScoreOptions, weights_of
from hesse.solvers.refit import best_values, kept_part

Scope = Literal["network", "layer"]


def prune_module(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    score: str = "oba",
    sparsity: float = 0.5,
    scope: Scope = "network",
    steps: int = 1,
    update: bool = True,
    loss: Loss | nn.Module | None = None,
    layers: Sequence[str] = ("*",),
    ignore: Sequence[str] = (),
    forward: Callable[[nn.Module, Any], Tensor] | None = None,
    kind: Kind = "sampled",
    attack: Attack | None = None,
    seed: int = 0,
) -> ModuleReport:
    """Set the weights of any `torch.nn.Module` that a score ranks lowest to zero; `model` itself is left as it is.

    Scores look at the whole network, and move no weight but with "m-fac-network", whose curvature says how those
    that stay make the loss good, jointly for all that go. For methods that solve one layer after another, see
    `compress_module`, whose arguments those not named here are.

    Args:
        model: it is copied, and the copy is run in eval mode.
        batches: (inputs, targets) pairs.
        score: a name in `hesse.modules.SCORES`.
        sparsity: the share of the layers' weights to remove.
        scope: where the share is counted: over all layers together, or in each.
        steps: how often scores are computed anew, on what is left; each step leaves the same share of it.
        update: whether weights that stay move, where the score has a curvature for that.
        loss: as in `compress_module`.
        layers: as in `compress_module`.
        ignore: as in `compress_module`.
        forward: as in `compress_module`.
        kind: of the Fisher in "obd" and "m-fac-network".
        attack: what moves the inputs that "mad" looks at.
        seed: of sampled labels, and of "random".

    Returns:
        The changed copy and its account. The prediction is ½ dᵀGd with the exact Gauss-Newton matrix G of the dense
        network, whatever the score is.

    Raises:
        HesseError: one of its kinds names what is wrong and what to do.
    """
    if score not in SCORES:
        raise OptionError(f"there is no score {score!r}; there are {', '.join(SCORES)}")
    if scope not in ("network", "layer") or steps < 1:
        raise OptionError(f"the scope is 'network' or 'layer' and steps are 1 or more, not {scope!r} and {steps}")
    Sparse(sparsity)
    with copied(model) as (copy, found, notes):
        names = [layer.name for layer in found]
        check_patterns(names, (name for name, _ in copy.named_modules()), (*layers, *ignore))
        chosen = [layer for layer in found if _matches(layer, layers) and not _matches(layer, ignore)]
        if not chosen:
            raise OptionError("no layer is left to prune: ignore fewer")
        options = ScoreOptions(kind, seed, attack)
        with objective_of(copy, chosen, batches, loss, forward) as objective:
            before, dense = objective.value(), weights_of(objective)
            kept = torch.ones_like(dense, dtype=torch.bool)
            for step in range(1, steps + 1):
                judged = SCORES[score](objective, options)
                share = 1 - (1 - sparsity) ** (step / steps)
                stays = _stay(objective, torch.where(kept, judged.scores, -torch.inf), share, scope)
                _put(objective, _values(judged, weights_of(objective), kept, stays, update))
                kept = stays
            after, change = objective.value(), weights_of(objective) - dense
            _put(objective, dense)
            predicted = GaussNewton(objective=objective).quadratic(change)
            _put(objective, dense + change)
            reports = [_report(layer, score) for layer in chosen]
        notes += [f"{report.name}: all of its weights were removed" for report in reports if report.sparsity == 1]
        return ModuleReport(
            module=copy,
            method=score,
            loss_before=before,
            loss_after=after,
            predicted_loss_increase=predicted,
            bits_per_weight=sum(r.bits_per_weight * r.shape[0] * r.shape[1] for r in reports) / len(dense),
            layers=reports,
            notes=notes,
            recipe={"score": score, "sparsity": sparsity, "scope": scope, "steps": steps, "update": update},
            encoded={layer.name: Sparse().encode_masked(layer.weight, layer.weight != 0) for layer in chosen},
        )


def _matches(layer: Layer, patterns: Sequence[str]) -> bool:
    return any(matches(layer.name, pattern) for pattern in patterns)


def _stay(objective: Objective, scores: Tensor, share: float, scope: Scope) -> Tensor:
    """Which weights of all (size,) stay."""
    rows = [piece.flatten() for piece in objective.split(scores)] if scope == "layer" else [scores]
    return torch.cat([Sparse(share).mask(row[None])[0] for row in rows])


def _values(judged: Judgement, weights: Tensor, kept: Tensor, stays: Tensor, update: bool) -> Tensor:
    """The weights (size,) after those are removed that do not stay, of those that were `kept`."""
    if judged.curvature is None or not update:
        return weights * stays
    alive = kept_part(judged.curvature, kept)
    return best_values(alive, kept_part(alive, stays), weights, stays)


@torch.no_grad()
def _put(objective: Objective, weights: Tensor) -> None:
    for parameter, piece in zip(objective.parameters, objective.split(weights), strict=True):
        parameter.copy_(piece)


def _report(layer: Layer, score: str) -> LayerReport:
    weight = layer.weight.detach()
    share = 1 - int(torch.count_nonzero(weight)) / weight.numel()
    stored = Sparse(min(share, 1 - 1 / weight.numel()), dtype=weight.dtype)
    return LayerReport(
        name=layer.name,
        shape=(weight.shape[0], weight.shape[1]),
        method=f"{score} × Sparse",
        tokens=0,
        damping=0.0,
        bits_per_weight=stored.bits_per_weight(weight.shape),
        sparsity=share,
        rank=None,
        predicted_loss_increase=None,
        relative_output_error=None,
    )
