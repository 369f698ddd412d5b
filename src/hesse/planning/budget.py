"""Divide a budget of bytes, bits or loss among the layers of a model: find the recipe of least predicted loss."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hesse.checkpoints.checkpoint import Checkpoint
from hesse.checkpoints.locate import locate
from hesse.data.selection import Calibration, Data, select_samples
from hesse.errors import OptionError
from hesse.estimation import Statistics
from hesse.estimation.statistics import probe_tokens
from hesse.formats import open_networks
from hesse.formats.targets import check_target
from hesse.layerwise.rules import check_patterns
from hesse.methods import DEFAULT_METHOD, Method, Options, find_method, methods_of
from hesse.methods.recipe import Recipe, Rule
from hesse.networks.device import find_device
from hesse.planning import Candidate, Choice, ChoiceGroup, Problem, size_loss_front, smallest_within
from hesse.planning.costs import CostMeter
from hesse.planning.menu import LayerGroup, Offer, make_menu
from hesse.planning.planners import PLANNERS
from hesse.planning.sizes import read_size
from hesse.progress import Clock, Progress, Silence
from hesse.result import LossChange, Report, Result
from hesse.scores.sensitivities import Sensitivity, find_sensitivity
from hesse.version import versions

FRONT_POINTS = 12
HEADER_ENTRY = 64  # bytes of a tensor's entry in the header of a safetensors file, without its name and offsets


@dataclass(frozen=True)
class Budget:
    """A budget: exactly one of a size, mean bits and a loss.

    Raises:
        OptionError: none or more than one is given, or its value is invalid.
    """

    size: str | int | None = None  # of the weights' files: "40%" of the dense files, "5MB", or bytes
    bits: float | None = None  # per weight of the planned layers, including scales and zero points
    loss: float | None = None  # the largest predicted loss increase, nats per token

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.size, self.bits, self.loss)) != 1:
            raise OptionError("give one budget: a size, mean bits, or a loss")
        for name, value in (("bits", self.bits), ("loss", self.loss)):
            if value is not None and not 0 < value < float("inf"):
                raise OptionError(f"--{name} is {value}: give a number above 0")
        if self.size is not None:
            self.bytes_of(1)

    def bytes_of(self, whole: int) -> int:
        """Return the size in bytes, for a model whose files have `whole` bytes."""
        text = str(self.size).strip()
        found = read_size(text, percent=whole / 100)
        if not found:
            raise OptionError(f"--size is {text!r}: give a share such as 40%, or bytes such as 5MB or 1.5GB")
        return int(found)


@dataclass(frozen=True)
class BudgetRequest:
    """A budget, and the method and options to meet it; given `options` hold for all layers."""

    budget: Budget
    method: Method
    options: Options
    ignore: tuple[str, ...]
    target: str
    allocation: str | None = None  # the name of a predictor of costs; None: solve each layer for each choice

    @property
    def _allocation_row(self) -> Method | None:
        rows = methods_of("allocate") | methods_of("price")
        return None if self.allocation is None else rows.get(self.allocation)

    @property
    def planner(self) -> str:
        """Return the planner of the allocation's row."""
        return "knapsack" if self._allocation_row is None else self._allocation_row.solver

    @property
    def sensitivity(self) -> Sensitivity | None:
        """The predictor.

        Raises:
            OptionError: there is none of that name, or its costs are no nats, in which the budget is.
        """
        if self.allocation is None:
            return None
        row = self._allocation_row
        found = find_sensitivity(self.allocation if row is None or row.score is None else row.score)
        if found.shards:
            raise OptionError(
                f"--allocation {found.name} compares parts of the data, which the walk over a checkpoint does not keep "
                "apart: use hawq or hawq-v2, or hesse.planning.allocate on a module in memory"
            )
        if self.budget.loss is not None and not found.nats:
            raise OptionError(f"--allocation {found.name} ranks layers and predicts no loss: give --size or --bits")
        return found


@dataclass(frozen=True, eq=False)
class BudgetPlan:
    """The recipe of least predicted loss within a budget, and the loss at other sizes."""

    recipe: Recipe
    size: int  # upper bound of the bytes of the weights' files
    bits: float  # per weight of the planned layers, including scales and zero points
    loss: float  # predicted, nats per token
    front: list[dict[str, Any]]  # kind ("front", "chosen" or "uniform"), label, bytes and predicted
    notes: list[str]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain JSON values, for `from_dict`."""
        return {**vars(self), "recipe": self.recipe.model_dump(mode="json", exclude_none=True)}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "BudgetPlan":
        """Return the plan that `to_dict` described."""
        return cls(**{**content, "recipe": Recipe.model_validate(content["recipe"])})


@dataclass(frozen=True, kw_only=True)
class PlanReport(Report):
    """A recipe within a budget; `bytes_after` is the most that its weights' files take."""

    bytes_after: int
    bits_per_weight: float  # of the planned layers, scales and zero points included
    loss: LossChange  # predicted
    recipe: Recipe
    front: list[dict[str, Any]]  # other choices: kind ("front", "chosen" or "uniform"), label, bytes and predicted

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return {**super().to_dict(), "recipe": self.recipe.model_dump(mode="json", exclude_none=True)}


def budget_request(
    budget: Budget,
    method: str,
    options: Options | None,
    ignore: Sequence[str],
    target: str | None,
    allocation: str | None,
) -> BudgetRequest:
    """Return the request for a plan from the arguments of `compress` and `plan`."""
    return BudgetRequest(
        budget,
        find_method(method, "compress"),
        options or Options(),
        tuple(ignore),
        target or "transformers",
        allocation,
    )


def plan(
    model: str | Path,
    *,
    method: str = DEFAULT_METHOD,
    options: Options | None = None,
    ignore: Sequence[str] = (),
    data: Data = None,
    statistics: str | Path | None = None,
    samples: int = 128,
    length: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    device: str = "auto",
    format: str = "auto",
    size: str | int | None = None,
    mean_bits: float | None = None,
    loss: float | None = None,
    target: str | None = None,
    allocation: str | None = None,
    progress: Progress | None = None,
) -> Result[PlanReport]:
    """Plan the recipe that divides one budget among the layers at the least predicted loss; write nothing.

    Give exactly one of `size`, `mean_bits` and `loss`; with `loss` the plan has the smallest size. Given `options` hold
    for all layers. The arguments are those of `compress`; the default `target` is `transformers`.

    Raises:
        HesseError: the subclass and message say what is wrong and what to do; for a budget that cannot be met, the
            message gives one that can.
    """
    planned = plan_budget(
        locate(model),
        budget_request(Budget(size, mean_bits, loss), method, options, ignore, target, allocation),
        Calibration(data, samples, length, seed, batch_size),
        None if statistics is None else Path(statistics),
        format=format,
        device=find_device(device),
        progress=progress or Silence(),
    )
    report = PlanReport(
        verb="plan",
        model=str(model),
        method=method,
        bytes_after=planned.size,
        bits_per_weight=planned.bits,
        loss=LossChange(name="loss increase", predicted=planned.loss),
        recipe=planned.recipe,
        front=planned.front,
        notes=planned.notes,
        seconds={"total": planned.seconds},
        versions=versions(),
    )
    return Result(report)


def plan_budget(
    model: Path,
    request: BudgetRequest,
    calibration: Calibration,
    statistics: Path | None,
    *,
    format: str,
    device: torch.device,
    progress: Progress,
    offload: Path | None = None,
) -> BudgetPlan:
    """Plan the compression of each layer of the model folder `model`.

    Every layer is solved alone, on the dense model, for every offer; the plan minimises the sum of the resulting costs.
    With an `allocation`, its predictor gives the costs, and no layer is solved.
    With a folder `offload`, the hidden states and activations of batches that wait are in files there.

    Raises:
        OptionError: the budget cannot be met; the message says what is reachable.
        HesseError: the model, the data or an option is wrong.
    """
    clock, sensitivity = Clock(), request.sensitivity
    check_target(request.target)
    if request.method.rewrite is not None:
        raise OptionError(
            f"a budget is planned on a model as it is, and {request.method.name} rewrites it: give --bits, or use "
            "`hesse rotate` first and plan on what it writes"
        )
    if request.options.over(request.method.defaults).input_bits is not None:
        raise OptionError("a budget counts what weights cost, not their inputs: leave out --input-bits, or the budget")
    checkpoint, _, network = open_networks(model, device)
    names = [layer.name for layer in network.layers]
    check_patterns(names, (name for name, _ in network.model.named_modules()), request.ignore)
    menu = make_menu(network, request.method, request.options, request.ignore, request.target, format)
    meter = CostMeter(menu, sensitivity)
    if statistics is None:
        selected = select_samples(model, calibration, network, probe_tokens(meter.needs, network.layers, 0))
        meter.measure(network, selected, calibration, progress, offload)
    else:
        estimated = Statistics(statistics)
        estimated.check_model(checkpoint)
        estimated.check_holds("gram")
        meter.read(network, estimated, progress)
    priced = PricedMenu(checkpoint, menu, meter.costs, request.planner)
    choice = priced.choose(request.budget)
    return BudgetPlan(
        recipe=priced.recipe(choice, request.method, request.ignore),
        size=priced.rest + priced.problem.size(choice),
        bits=8 * priced.problem.size(choice) / priced.weights,
        loss=priced.problem.loss(choice),
        front=priced.front(choice),
        notes=meter.notes,
        seconds=clock.total,
    )


class PricedMenu:
    """A menu of offers with their costs, as a planning problem."""

    def __init__(
        self, checkpoint: Checkpoint, menu: list[LayerGroup], costs: dict[str, list[float]], planner: str = "knapsack"
    ) -> None:
        self.menu, self.checkpoint, self.planner = menu, checkpoint, planner
        self.problem = Problem(
            tuple(
                ChoiceGroup(
                    group.name,
                    tuple(
                        Candidate(offer.label, offer.size, cost)
                        for offer, cost in zip(group.offers, costs[group.name], strict=True)
                    ),
                )
                for group in menu
            )
        )
        layers = [layer for group in menu for layer in group.layers]
        self.weights = sum(layer.weight.numel() for layer in layers)
        names = [*checkpoint.stored_names(), *(3 * [f"{layer.name}.weight_packed" for layer in layers])]
        dense = sum(checkpoint.dtype(f"{x.name}.weight").itemsize * x.weight.numel() for x in layers)
        entry = HEADER_ENTRY + 2 * len(str(checkpoint.file_bytes))
        header = sum(len(name.encode()) + entry for name in names)
        self.rest = checkpoint.stored_bytes - dense + header  # bytes that no choice changes

    def choose(self, budget: Budget) -> Choice:
        """Return the best choice within a budget.

        Raises:
            OptionError: no choice fits, or the dense model already fits.
        """
        if budget.loss is not None:
            choice = smallest_within(self.problem, budget.loss)
        else:
            choice = PLANNERS.find(self.planner)(self.problem, self._room(budget))
        if not any(group.offers[place].rule for group, place in zip(self.menu, choice, strict=True)):
            raise OptionError("the dense model is within this budget already: nothing is to be compressed")
        return choice

    def _room(self, budget: Budget) -> int:
        """Return the bytes that the planned layers may take.

        Raises:
            OptionError: the layers cannot be made so small.
        """
        least, whole = self.problem.smallest, self.checkpoint.file_bytes
        if budget.bits is not None:
            room = int(budget.bits * self.weights / 8)
            if room < least:
                smallest = _up(8 * least / self.weights, 3)
                raise OptionError(
                    f"{budget.bits:g} bits cannot be reached: the smallest mean is {smallest:g} bits, scales included"
                )
            return room
        wanted = budget.bytes_of(whole)
        if wanted < self.rest + least:
            raise OptionError(
                f"{wanted:,} bytes cannot be reached: the smallest size is {self.rest + least:,} bytes "
                f"({_up(100 * (self.rest + least) / whole, 1):g}%), of which {self.rest:,} are not planned, "
                "such as embeddings"
            )
        return wanted - self.rest

    def recipe(self, choice: Choice, method: Method, ignore: tuple[str, ...]) -> Recipe:
        """Return the choice as a recipe, with rules from the smallest scheme to the largest."""
        chosen: dict[str, tuple[Offer, list[LayerGroup]]] = {}
        for group, place in zip(self.menu, choice, strict=True):
            offer = group.offers[place]
            chosen.setdefault(offer.label, (offer, []))[1].append(group)
        alone, rules = list(ignore), list[Rule]()
        for offer, groups in sorted(chosen.values(), key=lambda entry: entry[0].size / _weights(entry[1][0])):
            patterns = tuple(pattern for group in groups for pattern in self._patterns(group))
            if offer.rule is None:
                alone += patterns
            else:
                rules.append(offer.rule.model_copy(update={"layers": patterns}))
        about = (
            f"planned: {self.problem.loss(choice):.4g} nats per token predicted, "
            f"{self.rest + self.problem.size(choice):,} bytes, "
            f"{8 * self.problem.size(choice) / self.weights:.3f} bits per planned weight"
        )
        return Recipe(method=method.name, about=about, rules=tuple(rules), ignore=tuple(alone))

    def _patterns(self, group: LayerGroup) -> list[str]:
        return [group.name] if "*" in group.name else [layer.name for layer in group.layers]

    def front(self, choice: Choice) -> list[dict[str, Any]]:
        """Return the best choices of all sizes, the chosen and the uniform ones, with sizes and predicted losses."""
        points = [self._point("front", "", point.choice) for point in size_loss_front(self.problem, FRONT_POINTS)]
        labels = dict.fromkeys(offer.label for group in self.menu for offer in group.offers if offer.rule is not None)
        for label in labels:
            places = [next((i for i, o in enumerate(g.offers) if o.label == label), None) for g in self.menu]
            if None not in places:
                points.append(self._point("uniform", label, tuple(place for place in places if place is not None)))
        return [*points, self._point("chosen", "", choice)]

    def _point(self, kind: str, label: str, choice: Choice) -> dict[str, Any]:
        size, loss = self.rest + self.problem.size(choice), self.problem.loss(choice)
        return {"kind": kind, "label": label, "bytes": size, "predicted": loss}


def _weights(group: LayerGroup) -> int:
    return sum(layer.weight.numel() for layer in group.layers)


def _up(value: float, digits: int) -> float:
    """Round up, so that the reported limit is always reachable."""
    return float(np.ceil(value * 10**digits) / 10**digits)
