"""Pruning of a network in memory: single weights, groups that are cut out, dimensions of heads."""

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from hesse.constraints import Sparse
from hesse.curvature import Loss
from hesse.errors import DataError, OptionError
from hesse.finite import all_finite
from hesse.layerwise.rules import check_patterns
from hesse.methods import Method, find_row, methods_of
from hesse.methods.patterns import matches
from hesse.methods.strategies import STRATEGIES
from hesse.modules.head_dimensions import HeadDimensions
from hesse.modules.preparation import copy_model, dense_loss, layers_objective
from hesse.modules.report import PruneReport, flops_of
from hesse.modules.sites import GroupStrategy, freeze_as, pruning_objective
from hesse.modules.weight_ranking import WeightRanking
from hesse.networks.network import Layer
from hesse.options import check_types, settings_of
from hesse.partitions import GROUP_KINDS
from hesse.result import LossChange, Result
from hesse.scores import SCORES

MEASURED = "loss on the data"
IN_MEMORY = ("weights", *GROUP_KINDS, "groups", "head-dimensions")
DEFAULTS = {"weights": "magnitude", "groups": "obs", "head-dimensions": "modegpt-heads"}
# The strategies that take any score, by the parts that they remove.
RANKINGS = {"weights": "weight_ranking", "groups": "group_ranking", "blocks": "block_ranking"}


@torch.inference_mode(False)
@torch.enable_grad()
def prune_in_memory(
    model: nn.Module,
    data: Iterable[Any],
    *,
    what: str | Sequence[str] | None = None,
    method: str | None = None,
    loss_function: Loss | nn.Module | None = None,
    forward: Callable[[nn.Module, Any], Tensor] | None = None,
    seed: int = 0,
    layers: Sequence[str] = ("*",),
    ignore: Sequence[str] = (),
    **options: Any,
) -> Result[PruneReport]:
    """Prune a copy of a network in memory; the arguments are those of `hesse.prune`.

    Raises:
        HesseError: one of its kinds names what is wrong. Options are checked before the network is run; before groups
            are scored, the network is traced, and one group of each site is cut out to see that it runs so.
    """
    kinds = find_kinds(what, method)
    if unknown := [kind for kind in kinds if kind not in IN_MEMORY]:
        place = ": blocks are pruned on disk, give a model folder and OUT" if unknown[0] == "blocks" else ""
        raise OptionError(f"there are no {unknown[0]} to prune in a module{place}; there are {', '.join(IN_MEMORY)}")
    family = "groups" if kinds[0] in GROUP_KINDS else kinds[0]
    method = method or DEFAULTS[family]
    strategy = build_strategy(family, method, options)
    if family == "weights":
        return _prune_weights(model, data, strategy, loss_function, forward, seed, layers, ignore)
    if tuple(layers) != ("*",) or ignore:
        raise OptionError("layers and ignore choose weights: leave them out, or prune what='weights'")
    return _cut_parts(model, data, method, strategy, kinds, loss_function, forward, seed)


def find_kinds(what: str | Sequence[str] | None, method: str | None) -> tuple[str, ...]:
    """Return the kinds of parts to prune; without any, those of the method's row.

    Raises:
        OptionError: they cannot be pruned in one call.
    """
    if what is None:
        rows = prune_rows()
        what = rows[method].partition if method in rows else "weights"
    elif not isinstance(what, str) and not (isinstance(what, Sequence) and all(isinstance(kind, str) for kind in what)):
        raise OptionError(f"what is {what!r}: give one name of parts, or a list of names")
    kinds = (what,) if isinstance(what, str) else tuple(what)
    if not kinds or (len(kinds) > 1 and not set(kinds) <= set(GROUP_KINDS)):
        raise OptionError(f"{kinds} cannot be pruned in one call: only {', '.join(GROUP_KINDS)} can")
    return kinds


def prune_rows() -> dict[str, Method]:
    """Return the rows of the table that prune, in memory or on disk."""
    return {**methods_of("prune"), **methods_of("prune_checkpoint")}


def build_strategy(family: str, method: str, options: dict[str, Any]) -> Any:
    """Build the strategy of a method from its row and its options.

    `method` is the name of a row for parts of this family, with or without "-groups", or of a score, also of one that
    has no row.

    Raises:
        OptionError: there is no such method, or it has no such option.
    """
    rows = {name: row for name, row in prune_rows().items() if row.partition == family}
    row = find_row(method, rows)
    if row is not None:
        solver, score = row.solver, row.score
    elif method in SCORES and family in RANKINGS:
        solver, score = RANKINGS[family], method
    else:
        kinds = {*GROUP_KINDS, "groups"} if family == "groups" else {family} & set(RANKINGS)
        known = [name.removesuffix("-groups") for name in rows]
        known += [score.name for score in SCORES.values() if kinds & set(score.parts) and score.name not in known]
        raise OptionError(f"there is no method {method!r} that prunes {family}; there are {', '.join(known)}")
    strategy = STRATEGIES.find(solver)
    takes = [option.name for option in settings_of(strategy)]
    if unknown := [name for name in options if name not in takes]:
        raise OptionError(f"the method {method} has no option {unknown[0]!r}; it has {', '.join(takes)}")
    check_types({option.name: option.type for option in settings_of(strategy)}, options)
    return strategy(**options) if score is None else strategy(score, **options)


def _cut_parts(
    model: nn.Module,
    data: Iterable[Any],
    method: str,
    strategy: GroupStrategy | HeadDimensions,
    kinds: Sequence[str],
    loss_function: Loss | nn.Module | None,
    forward: Callable[[nn.Module, Any], Tensor] | None,
    seed: int,
) -> Result[PruneReport]:
    """Cut groups, or dimensions of heads, out of a copy of the model."""
    strategy.check(() if "groups" in kinds else kinds)
    objective = pruning_objective(deepcopy(model), data, loss_function, forward)
    found: Any = strategy.find(objective, kinds, model.training, seed)
    parameters = sum(parameter.numel() for parameter in objective.model.parameters())
    flops, before = flops_of(objective), dense_loss(objective)
    smaller = strategy.prune(found, kinds)
    after = pruning_objective(smaller.model, objective.data, objective.loss, objective.forward)
    report = PruneReport(
        model=type(model).__name__,
        method=method,
        what=", ".join(smaller.kinds),
        settings=_settings(strategy),
        removed=smaller.removed,
        parameters_before=parameters,
        parameters_after=sum(parameter.numel() for parameter in smaller.model.parameters()),
        flops_before=flops,
        flops_after=flops_of(after),
        loss_before=before,
        loss_after=(value := after.value()),
        loss=LossChange(name=MEASURED, predicted=smaller.predicted, measured=value - before, held_out=False),
        difference=smaller.difference,
        loading=smaller.loading,
    )
    freeze_as(model, smaller.model)
    return Result(report, smaller.model)


def _prune_weights(
    model: nn.Module,
    data: Iterable[Any],
    ranking: WeightRanking,
    loss_function: Loss | nn.Module | None,
    forward: Callable[[nn.Module, Any], Tensor] | None,
    seed: int,
    layers: Sequence[str],
    ignore: Sequence[str],
) -> Result[PruneReport]:
    """Set weights of a copy of the model to zero."""
    ranking.check([])
    with copy_model(model) as (copy, found, notes):
        names = [layer.name for layer in found]
        check_patterns(names, (name for name, _ in copy.named_modules()), (*layers, *ignore))
        chosen = [layer for layer in found if _matches(layer, layers) and not _matches(layer, ignore)]
        if not chosen:
            raise OptionError("no layer is left to prune: ignore fewer")
        ranking.check(chosen)
        for layer in chosen:
            if not all_finite(layer.weight.detach()):
                raise DataError(f"{layer.name}: the weight holds NaN or infinity")
        with layers_objective(copy, chosen, data, loss_function, forward) as objective:
            before, after, predicted = ranking.prune(objective, seed)
            reports = [ranking.report(layer) for layer in chosen]
        report = PruneReport(
            model=type(model).__name__,
            method=ranking.score,
            what="weights",
            settings=_settings(ranking),
            removed={layer.name: (int((layer.weight == 0).sum()), layer.weight.numel()) for layer in chosen},
            loss_before=before,
            loss_after=after,
            loss=LossChange(name=MEASURED, predicted=predicted, measured=after - before, held_out=False),
            bits_per_weight=sum(r.bits_per_weight * r.shape[0] * r.shape[1] for r in reports) / objective.size,
            layers=reports,
            notes=[
                *notes,
                *(f"{each.name}: all of its weights were removed" for each in reports if each.sparsity == 1),
            ],
            encoded={layer.name: Sparse().encode_masked(layer.weight, layer.weight != 0) for layer in chosen},
        )
    return Result(report, copy)


def _settings(strategy: Any) -> dict[str, Any]:
    """Return the options of a strategy by name, as a report writes them."""
    return {each.name: getattr(strategy, each.name) for each in fields(strategy) if each.name != "attack"}


def _matches(layer: Layer, patterns: Sequence[str]) -> bool:
    return any(matches(layer.name, pattern) for pattern in patterns)
