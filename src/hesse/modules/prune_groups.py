"""Structured pruning: score groups, share the budget, cut, and measure."""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any

from torch import Tensor, nn

from hesse.curvature import CrossEntropy, Loss, Objective
from hesse.curvature.objective import Batch
from hesse.errors import OptionError
from hesse.modules.group_budget import Ranking, shared_numbers, uniform_numbers
from hesse.modules.group_report import StructuredReport, flops_of, parameters_of
from hesse.modules.hierarchy import within_hierarchy
from hesse.modules.implant import Implant, implant
from hesse.modules.ranking import IN_NATS, METHODS, Ranker
from hesse.modules.tolerance import within_tolerance
from hesse.partitions import KINDS, Group, check_partition, check_slicing, loading_problem, trace_groups
from hesse.passes.per_sample import rows_of

Chosen = dict[str, list[Group]]  # by site
MEASURING = ("pagcp", "axformer")


def prune_groups(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    method: str = "obs",
    amount: float | None = None,
    kinds: Sequence[str] | None = None,
    loss: Loss | nn.Module | None = None,
    uniform: bool = True,
    cap: float | None = None,
    refit: bool | None = None,
    tolerance: float | None = None,
    implanted: Implant | None = None,
    forward: Callable[[nn.Module, Any], Tensor] | None = None,
    seed: int = 0,
) -> tuple[nn.Module, StructuredReport]:
    """Take those heads, neurons, channels or experts out of a network that cost its loss least.

    Args:
        model: any network whose groups `hesse.partitions.trace_groups` finds; it stays as it is.
        batches: (inputs, targets) pairs, such as a DataLoader or a list; walked once and kept.
        method: `random`, `magnitude`, `taylor`, `fisher`, `hap`, `heapr` or `obs`; or `pagcp` or `axformer`, which
            measure. Where `axformer` takes all of a site, one group stays, at zero.
        amount: the share that goes: of each site's groups, or, if not `uniform`, of all parameters in them; None for
            0.3.
        kinds: of `heads`, `neurons`, `channels`, `experts`; None for those of the first three that there are.
        loss: a Loss of `hesse.curvature`, or torch's CrossEntropyLoss or MSELoss; None for cross-entropy.
        uniform: the same share everywhere, which models need that transformers shall load; else one ranking over
            the whole network by cost a parameter, with at most the share `cap` of each site.
        cap: the most that goes of a site; None for 0.9.
        refit: whether what reads the groups is fitted again, by least squares on the inputs that are left; None for
            what the method does: `obs` does.
        tolerance: for `pagcp` and `axformer`, by how much the loss on `batches` may rise; for `pagcp`, `amount` then
            bounds each site; `axformer` takes neither `amount` nor `cap`.
        implanted: for `hap`, how many groups next in the ranking become a low rank.
        forward: `forward(model, inputs)` gives the outputs; by default `model(inputs)`.
        seed: of random choices and sampled labels.

    Returns:
        The smaller model, in eval mode, and what was done to it.

    Raises:
        HesseError: one of its kinds names what is wrong. Before anything is scored, the network is traced, and one
            group of each site is cut out to see that the network can do without.
    """
    if method == "axformer" and (amount is not None or cap is not None):
        raise OptionError("axformer goes by the tolerance alone: leave out amount and cap, or choose pagcp")
    amount, cap = 0.3 if amount is None else amount, 0.9 if cap is None else cap
    _check(method, amount, cap, refit, tolerance, implanted, kinds)
    objective = objective_of(model, batches, loss, forward)
    sites = cuttable_sites(objective, kinds)
    before = (parameters_of(model), flops_of(objective), objective.value())
    ranker, rankings, predicted = None, list[Ranking](), None
    if tolerance is not None:
        if method == "pagcp":
            gone = within_tolerance(objective, sites, tolerance, min(amount, cap))
        else:
            gone = within_hierarchy(objective, sites, tolerance)
        gone = {site: leaving_one(groups, sites[site]) for site, groups in gone.items()}
    else:
        ranker = Ranker(objective, sites, method, cap, (method == "obs") if refit is None else refit, seed)
        rankings = ranker.rankings(amount if uniform else 1.0)
        numbers = (uniform_numbers if uniform else shared_numbers)(rankings, amount)
        gone = {r.site: list(r.groups[:number]) for r, number in zip(rankings, numbers, strict=True)}
        if method in IN_NATS:
            predicted = sum(sum(r.costs[:number]) for r, number in zip(rankings, numbers, strict=True))
    gone = _without_nested(gone)
    if ranker is not None:
        ranker.refit(gone)
    sliced, difference = cut(objective, gone)
    if implanted is not None:
        rows = _rows(objective.model, gone, rankings, implanted.share)
        implant(objective_of(sliced, objective.data, objective.loss, forward, copied=False), rows, implanted.rank)
    return sliced, report_of(method, model, sliced, objective, sites, gone, before, difference, predicted)


def leaving_one(gone: list[Group], there: Sequence[Group]) -> list[Group]:
    """What of groups at zero can be cut out: one stays, at zero, where all of a site are."""
    return gone[1:] if len(gone) == len(there) else gone


def objective_of(
    model: nn.Module,
    batches: Iterable[Batch],
    loss: Loss | nn.Module | None,
    forward: Callable[[nn.Module, Any], Tensor] | None,
    copied: bool = True,
) -> Objective:
    """The loss of a model in eval mode, or of a copy, all of whose parameters take gradients."""
    model = (deepcopy(model) if copied else model).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return Objective.of(model, CrossEntropy() if loss is None else loss, list(batches), forward=forward)


def freeze_as(model: nn.Module, smaller: nn.Module) -> None:
    """Have the parameters of `smaller` take gradients where those of `model` do, by their names."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    for name, parameter in smaller.named_parameters():
        parameter.requires_grad_(parameter.is_floating_point() and name not in frozen)


def cuttable_sites(objective: Objective, kinds: Sequence[str] | None) -> Chosen:
    """The groups of some kinds by site, after one of each was cut out to see that the network can do without.

    Raises:
        OptionError: there are none.
        UnsupportedModelError: the network cannot be traced, or not be cut.
    """
    inputs = _some(objective)
    partition = trace_groups(objective.model, inputs, objective.call)
    there = {group.kind for group in partition.groups if group.kind != "experts"}
    chosen = tuple(sorted(there)) or KINDS[:3] if kinds is None else tuple(kinds)
    sites = partition.sites(chosen) if partition.of(chosen) else {}
    check_partition(objective.model, partition, inputs, chosen, objective.call)
    return sites


def cut(objective: Objective, gone: Mapping[str, Sequence[Group]]) -> tuple[nn.Module, float]:
    """The objective's model without some groups, and how far it is from the model with them at zero."""
    groups = [group for some in gone.values() for group in some]
    if not groups:
        return deepcopy(objective.model), 0.0
    return check_slicing(objective.model, groups, _some(objective), objective.call)


def _some(objective: Objective) -> Any:
    """Two samples, which show what the network does as well as more."""
    return rows_of(next(objective.batches())[0], slice(0, 2))


def report_of(
    method: str,
    model: nn.Module,
    sliced: nn.Module,
    objective: Objective,
    sites: Chosen,
    gone: Chosen,
    before: tuple[int, int, float],
    difference: float,
    predicted: float | None,
) -> StructuredReport:
    """Measure the smaller model on the objective's data, and give its parameters back their requires_grad."""
    after = objective_of(sliced, objective.data, objective.loss, objective.forward, copied=False)
    flops, value = flops_of(after), after.value()
    freeze_as(model, sliced)
    return StructuredReport(
        method=method,
        removed={site: (len(gone[site]), len(groups)) for site, groups in sites.items()},
        parameters=(before[0], parameters_of(sliced)),
        flops=(before[1], flops),
        loss=(before[2], value),
        predicted_loss_increase=predicted,
        difference=difference,
        loading=loading_problem(sliced),
    )


def _check(
    method: str,
    amount: float,
    cap: float,
    refit: bool | None,
    tolerance: float | None,
    implanted: Implant | None,
    kinds: Sequence[str] | None,
) -> None:
    if method not in (*METHODS, *MEASURING):
        raise OptionError(f"there is no structured method {method!r}; there are {', '.join((*METHODS, *MEASURING))}")
    if not 0 < amount < 1 or not 0 < cap <= 1:
        raise OptionError(f"amount is {amount} and cap {cap}, but they must be above 0, and amount below 1")
    if (method in MEASURING) != (tolerance is not None):
        raise OptionError("a tolerance goes with the methods pagcp and axformer, and no other: give both or none")
    if tolerance is not None and not tolerance >= 0:
        raise OptionError(f"tolerance is {tolerance}, but must be 0 or more, in the unit of the loss")
    if implanted is not None and method != "hap":
        raise OptionError(f"an implant goes with the method hap, not with {method}")
    if method in MEASURING and refit:
        raise OptionError(f"{method} measures the network as it is, without a refit: leave it out, or choose obs")
    if (method in (*MEASURING, "heapr", "obs") or refit) and "experts" in (kinds or ()):
        raise OptionError(f"{method} judges what reads a group, and an expert has its router there: use fisher")
    if {"experts", "neurons"} <= set(kinds or ()):
        raise OptionError(
            "experts and neurons in one ranking would count an expert's neurons twice: prune in two calls"
        )


def _without_nested(gone: Chosen) -> Chosen:
    """Leave out neurons of experts that go as a whole."""
    experts = {f"{group.site}.{group.index}" for groups in gone.values() for group in groups if group.kind == "experts"}
    return {site: [group for group in groups if group.site not in experts] for site, groups in gone.items()}


def _rows(model: nn.Module, gone: Chosen, rankings: Sequence[Ranking], share: float) -> dict[str, list[int]]:
    """By layer of the smaller model, the outputs of the groups that are next in the rankings."""
    lost, found = defaultdict[str, set[int]](set), defaultdict[str, list[int]](list)
    for group in (group for groups in gone.values() for group in groups):
        for piece in group.produced:
            lost[piece.parameter] |= set(piece.indices)
    for ranking in rankings:
        start = len(gone[ranking.site])
        for group in ranking.groups[start : start + round(share * len(ranking.groups))]:
            for piece in group.produced:
                name, _, key = piece.parameter.rpartition(".")
                if key == "weight" and isinstance(model.get_submodule(name), nn.Linear | nn.modules.conv._ConvNd):
                    before = sorted(lost[piece.parameter])
                    found[name] += [index - bisect_left(before, index) for index in piece.indices]
    return dict(found)
