"""The calls that the digests make: the only lines of them to change when the API of `hesse` does."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hesse
from hesse import planning, training
from hesse.checkpoints.locate import locate
from hesse.constraints import Grid, Sparse
from hesse.curvature import CrossEntropy, Objective
from hesse.errors import HesseError
from hesse.formats import open_networks
from hesse.methods import methods_of
from hesse.modules.implant import Implant
from hesse.scores import Attack

__all__ = ["HesseError"]
# The methods that `compress` runs, with what they make of layers.
METHODS = {name: method.constraints for name, method in methods_of("compress").items()}
OPTIONS = set(hesse.Options.__dataclass_fields__)
Batches = list[tuple[Any, Tensor]]


def with_options(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with a method's options as one `hesse.Options`, and a folder of statistics by its name."""
    arguments = {"statistics" if name == "curvature" else name: value for name, value in arguments.items()}
    options = {name: value for name, value in arguments.items() if name in OPTIONS}
    rest = {name: value for name, value in arguments.items() if name not in OPTIONS}
    return {**rest, "options": hesse.Options(**options)} if options else rest


def compress(model: str | Path, out: Path, **arguments: Any) -> Any:
    """Compress a checkpoint; a `recipe` is a YAML file."""
    if "recipe" in arguments:
        arguments["recipe"] = hesse.methods.load_recipe(arguments["recipe"])
    return hesse.compress(model, out, **with_options(arguments)).report


def plan(model: str | Path, **arguments: Any) -> Any:
    """Plan a budget."""
    return hesse.plan(model, **with_options(arguments)).report


def estimate(model: str | Path, out: Path, **arguments: Any) -> Any:
    """Estimate curvatures into a folder."""
    return hesse.estimate(model, out, **arguments).report


def rotate(model: str | Path, out: Path, **arguments: Any) -> Any:
    """Rotate a model."""
    return hesse.rotate(model, out, **arguments).report


def cut(model: str | Path, statistics: Path, out: Path, size: str) -> Any:
    """Cut a model to a size by one ranking."""
    return hesse.compress(model, out, method="acip", size=size, statistics=statistics).report


def narrow(model: str | Path, out: Path, **arguments: Any) -> Any:
    """Remove hidden units of feed-forward layers."""
    return hesse.prune(model, out, what="hidden", **arguments).report


def drop_blocks(model: str | Path, out: Path, **arguments: Any) -> Any:
    """Remove whole blocks, or store them as a low rank beside another."""
    given = {name: value for name, value in arguments.items() if name not in ("blocks", "importance", "share_rank")}
    if "blocks" in arguments:
        depth = len(open_networks(locate(model), torch.device("cpu"))[1].blocks)
        given["keep"] = 1 - arguments["blocks"] / depth
    score = arguments.get("importance", "loss")
    if arguments.get("share_rank") is None:
        given["method"] = score
    else:
        given |= {"method": "flexigpt", "rank": arguments["share_rank"], "score": score}
    return hesse.prune(model, out, what="blocks", **given).report


def repair(dense: str | Path, compressed: Path, out: Path, **arguments: Any) -> Any:
    """Add a low rank beside the layers of a compressed checkpoint."""
    return hesse.repair(dense, compressed, out, **arguments).report


def export(model: str | Path, out: Path, to: str) -> Any:
    """Write a model for another runtime."""
    return hesse.export(model, out, to=to).report


def inspect(model: str | Path, **arguments: Any) -> Any:
    """Inspect the loss around a model."""
    return hesse.inspect(model, **with_options(arguments)).report


def evaluate(model: str | Path, **arguments: Any) -> Any:
    """Evaluate a model."""
    return hesse.evaluate(model, **arguments).report


def compress_module(model: nn.Module, batches: Batches, **arguments: Any) -> Any:
    """Compress a module by a method of the table."""
    if "loss" in arguments:
        arguments["loss_function"] = arguments.pop("loss")
    result = hesse.compress(model, data=batches, **with_options(arguments))
    return {
        "module": result.model,
        **{key: getattr(result.report, key) for key in vars(result.report) if key != "loss"},
    }


def prune_module(model: nn.Module, batches: Batches, score: str, scope: str, **arguments: Any) -> Any:
    """Prune the weights of a module; an `attack` is the radius of one."""
    if "attack" in arguments:
        arguments["attack"] = Attack(arguments["attack"])
    scope = {"layer": "site"}.get(scope, scope)
    result = hesse.prune(model, data=batches, what="weights", method=score, scope=scope, **arguments)
    return result.model, result.report


def prune_groups(model: nn.Module, batches: Batches, **arguments: Any) -> Any:
    """Prune heads, hidden units, channels or experts of a module; `implanted` is a share and a rank."""
    kinds = arguments.pop("kinds", None)
    arguments["what"] = "groups" if kinds is None else ["hidden" if kind == "neurons" else kind for kind in kinds]
    if arguments["method"] != "axformer":
        arguments["keep"] = 1 - arguments.pop("amount", 0.3)
    if not arguments.pop("uniform", True):
        arguments["scope"] = "network"
    if arguments.pop("refit", False):
        arguments["refit"] = "least-squares"
    if "implanted" in arguments:
        arguments["implant"] = Implant(*arguments.pop("implanted"))
    if "tolerance" in arguments:
        arguments["loss"] = arguments.pop("tolerance")
    result = hesse.prune(model, data=batches, **arguments)
    return result.model, result.report


def narrow_heads(model: nn.Module, batches: Batches, keep: float) -> Any:
    """Reduce the dimensions of heads."""
    result = hesse.prune(model, data=batches, what="head-dimensions", keep=keep)
    return result.model, result.report


def only_train_once(model: nn.Module, batches: Batches, **arguments: Any) -> Any:
    """Train groups to zero, and cut them out."""
    result = hesse.prune(model, data=batches, what="groups", method="only-train-once", **arguments)
    return result.model, result.report


def prune_gradually(model: nn.Module, batches: Batches, steps: int, sparsity: float | str, **arguments: Any) -> Any:
    """Prune `model`, in place, in cuts with training in between."""
    how = training.Training(steps=steps)
    function = CrossEntropy()
    result = hesse.prune_gradually(model, batches, how, sparsity, loss_function=function, **with_options(arguments))
    return model, result.report


def recover(model: nn.Module, batches: Batches, steps: int, way: str, weight: str) -> Any:
    """Train `model`, in place, with `weight` held in a way of the table."""
    parameter = dict(model.named_parameters())[weight].detach()
    how, rule = training.Training(steps=steps), None
    held: dict[str, Any] | None = None
    if way == "teacher":
        distillation = hesse.training.Distillation(0.7, 2.0)
        how = training.Training(steps=steps, teacher=deepcopy(model), distillation=distillation)
    if way in ("zeros", "teacher"):
        parameter.mul_(Sparse(0.5).mask(parameter.square()))
    elif way == "codes":
        grid = Grid(3, 8)
        code = grid.encode(parameter)
        parameter.copy_(grid.decode(code))
        held = {weight: training.HeldCodes(grid, code)}
    elif way == "movement":
        held = {weight: training.Movement(Sparse(0.75), training.GradualSchedule(0.75, steps, cuts=4, first=0.0))}
    elif way == "one-bit":
        held = {weight: training.OneBit()}
    elif way == "signs":
        held = {weight: training.HeldSigns(parameter >= 0)}
    elif way == "compression-aware":
        held, rule = {}, training.CompressionAware((weight,))
    result = hesse.finetune(model, batches, how, loss_function=CrossEntropy(), held=held, rule=rule)
    return model, (result.report.losses, result.report.free)


def objective(model: nn.Module, batches: Batches) -> Objective:
    """The loss of a module over its matrices."""
    names = tuple(name for name, parameter in model.named_parameters() if parameter.ndim == 2)
    return Objective.of(model, CrossEntropy(), batches, names)


def price(model: nn.Module, batches: Batches, sensitivity: str) -> Any:
    """The predicted cost of each width of each matrix, the best choice in a size, and the lowest accepted one."""
    of = objective(model, batches)
    menu = planning.grid_menu(of, (8, 4, 3, 2))
    pricing = planning.price(of, menu, sensitivity)
    losses = [[candidate.loss for candidate in group.candidates] for group in pricing.problem.groups]
    most = sum(own[-1] for own in losses)
    accepted = planning.smallest_accepted(pricing.problem, lambda choice: pricing.problem.loss(choice) <= most / 2)
    return losses, pricing.cheapest(sum(own[2].size for own in menu.values())), accepted


def plan_tiles(model: nn.Module, batches: Batches, kept: float, gradients: Any) -> Any:
    """Which tiles of each matrix stay."""
    return planning.plan_tiles(objective(model, batches), kept, tile=(2, 2), gradients=gradients)
