"""`hesse.plan`: find the recipe of least predicted loss within one budget, divided among the layers of a model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hesse.checkpoints.locate import locate
from hesse.data.selection import Calibration, Data, select_samples
from hesse.errors import OptionError
from hesse.estimation import Statistics
from hesse.estimation.statistics import probe_tokens
from hesse.formats import open_networks
from hesse.formats.targets import check_target
from hesse.layerwise.rules import check_patterns
from hesse.methods import DEFAULT_METHOD, Options, Recipe, find_method
from hesse.networks.device import find_device
from hesse.planning.budget import Budget, BudgetRequest
from hesse.planning.costs import CostMeter
from hesse.planning.menu import make_menu
from hesse.planning.priced_menu import PricedMenu
from hesse.progress import Clock, Progress, Silence
from hesse.result import LossChange, Report, Result
from hesse.version import versions


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
    bos: bool | None = None,
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
    budget = Budget(size, mean_bits, loss)
    chosen = find_method(method, "compress")
    request = BudgetRequest(budget, chosen, options or Options(), tuple(ignore), target, allocation)
    report = plan_budget(
        model,
        request,
        Calibration(data, samples, length, seed, batch_size, bos),
        None if statistics is None else Statistics(Path(statistics)),
        format=format,
        device=find_device(device),
        progress=progress or Silence(),
    )
    return Result(report)


def plan_budget(
    model: str | Path,
    request: BudgetRequest,
    calibration: Calibration,
    statistics: Statistics | None,
    *,
    format: str,
    device: torch.device,
    progress: Progress,
    offload: Path | None = None,
) -> PlanReport:
    """Plan the compression of each layer of `model`.

    Every layer is solved alone, on the dense model, for every offer; the plan minimises the sum of the resulting costs.
    With an `allocation`, its predictor gives the costs, and no layer is solved.
    With a folder `offload`, the hidden states and activations of batches that wait are in files there.

    Raises:
        OptionError: the budget cannot be met; the message says what is reachable.
        HesseError: the model, the data or an option is wrong.
    """
    clock, target, sensitivity = Clock(), request.target or "transformers", request.sensitivity
    check_target(target)
    if request.method.rewrite is not None:
        raise OptionError(
            f"a budget is planned on a model as it is, and {request.method.name} rewrites it: give --bits, or use "
            "`hesse rotate` first and plan on what it writes"
        )
    if request.options.over(request.method.defaults).input_bits is not None:
        raise OptionError("a budget counts what weights cost, not their inputs: leave out --input-bits, or the budget")
    folder = locate(model)
    checkpoint, _, network = open_networks(folder, device)
    names = [layer.name for layer in network.layers]
    check_patterns(names, (name for name, _ in network.model.named_modules()), request.ignore)
    menu = make_menu(network, request.method, request.options, request.ignore, target, format)
    meter = CostMeter(menu, sensitivity)
    if statistics is None:
        selected = select_samples(folder, calibration, network, probe_tokens(meter.needs, network.layers, 0))
        meter.notes += selected.notes
        meter.measure(network, selected, calibration, progress, offload)
    else:
        statistics.check_model(checkpoint)
        statistics.check_holds("gram")
        meter.read(network, statistics, progress)
    priced = PricedMenu(network, menu, meter.costs, request.planner)
    choice = priced.choose(request.budget)
    return PlanReport(
        verb="plan",
        model=str(model),
        method=request.method.name,
        bytes_after=priced.rest + priced.problem.size(choice),
        bits_per_weight=8 * priced.problem.size(choice) / priced.weights,
        loss=LossChange(name="loss increase", predicted=priced.problem.loss(choice)),
        recipe=priced.recipe(choice, request.method, request.ignore),
        front=priced.front(choice),
        notes=meter.notes,
        seconds={"total": clock.total},
        versions=versions(),
    )
