"""A user's own network through the table of methods: probe the loss, then one walk that solves each layer."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hesse.constraints import LowRankCode
from hesse.curvature import Loss, Objective
from hesse.curvature.objective import Batch
from hesse.errors import OptionError, UnsupportedModelError
from hesse.estimation.calibrated import InputCollection
from hesse.estimation.statistics import BackwardCollection, by_statistic, needs_samples
from hesse.layerwise.layer_report import layer_report
from hesse.layerwise.layer_solver import LayerProblem, LayerSolver
from hesse.layerwise.report import LayerReport
from hesse.layerwise.rules import rules_for, statistics_needed
from hesse.methods import DEFAULT_METHOD, Options, Recipe, Rule, find_method
from hesse.modules.preparation import copy_model, layers_objective
from hesse.modules.report import ModuleReport
from hesse.networks.factored import factored, replace_module
from hesse.networks.network import Block, Layer
from hesse.passes.activation_offload import KeepInMemory
from hesse.passes.layer_stops import layer_stops
from hesse.passes.per_sample import FisherKind, GradientPass
from hesse.progress import Clock


def compress_module(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    method: str = DEFAULT_METHOD,
    recipe: Recipe | None = None,
    options: Options | None = None,
    loss: Loss | nn.Module | None = None,
    layers: Sequence[str] = ("*",),
    ignore: Sequence[str] = (),
    forward: Callable[[nn.Module, Any], Tensor] | None = None,
    kind: FisherKind = "sampled",
    seed: int = 0,
) -> ModuleReport:
    """Prune, quantise or factorise the layers of any `torch.nn.Module`; `model` itself is left as it is.

    Layers are nn.Linear, nn.Conv1d and nn.Conv2d without groups, transformers' Conv1D, and the `q_proj`, `k_proj` and
    `v_proj` that an nn.MultiheadAttention keeps in one weight; a convolution is the matrix (out, in · kernel) that its
    patches are multiplied by. Embeddings, norms and weights that two modules share stay.
    What the loss feels of each layer is taken from one pass back through the dense model; then all batches go
    through the copy together, stop at each layer, and go on through the solved one, so that later layers see inputs
    that the earlier, changed ones make. So the activations of all batches are in memory at once.

    A factorised layer is replaced by two smaller ones (nn.Linear + nn.Linear, or a convolution and one with a
    kernel of 1). All other results are stored dense in the layer's type: zeros, or exactly what codes and scales stand
    for, which are in the report.

    Args:
        model: it is copied, and the copy is run in eval mode.
        batches: (inputs, targets) pairs, such as a DataLoader or a list; walked once and kept.
        method: a row of `hesse methods`, changed by `options`; or give a whole `recipe` instead.
        recipe: what to do per layer, from `hesse.methods.load_recipe` or built in Python.
        options: `Options(bits=3, group_size=64)` and the like; what is None is the method's own choice.
        loss: a Loss of `hesse.curvature`, or torch's CrossEntropyLoss or MSELoss; None for cross-entropy.
        layers: patterns of the names of layers to change, as `model.named_modules()` has them.
        ignore: patterns of those to leave as they are.
        forward: `forward(model, inputs)` gives the outputs; by default `model(inputs)`.
        kind: "sampled" for the true Fisher, "empirical" for that of the data's own targets, which any loss has.
        seed: of sampled labels.

    Returns:
        The changed copy, what was done to each layer, and the loss before, predicted and measured, on `batches`.

    Raises:
        HesseError: one of its kinds names what is wrong and what to do. Options that do not fit a layer are refused
            before the model is run.
    """
    wanted = _recipe(method, recipe, options, layers, ignore)
    if wanted.rewrite is not None:
        raise OptionError(f"{wanted.rewrite} rewrites language models on disk, not modules: choose another method")
    if any(rule.input_bits is not None for rule in wanted.rules):
        raise OptionError("inputs are rounded in language models on disk, not in modules: leave out the bits of inputs")
    with copy_model(model) as (copy, found, notes):
        shapes = {layer.name: layer.weight.shape for layer in found}
        weights = {layer.name: partial(_weight, layer) for layer in found}
        rules = rules_for(wanted, weights, shapes, (name for name, _ in copy.named_modules()))
        if by_statistic(statistics_needed(rules)).keys() & {"attention factor", "weighted inputs"}:
            raise OptionError("attention is found in language models on disk, not in modules: use curvature kronecker")
        chosen = [layer for layer in found if rules[layer.name] is not None]
        with layers_objective(copy, chosen, batches, loss, forward) as objective:
            return _Run(objective, chosen, rules, notes).run(wanted, kind, seed)


def _recipe(
    method: str, recipe: Recipe | None, options: Options | None, layers: Sequence[str], ignore: Sequence[str]
) -> Recipe:
    if recipe is not None:
        if options is not None or ignore or tuple(layers) != ("*",):
            raise OptionError("a recipe says everything itself: leave out options, layers and ignore")
        return recipe
    made = find_method(method, "compress").recipe(options or Options(), tuple(ignore))
    rules = tuple(rule.model_copy(update={"layers": tuple(layers)}) for rule in made.rules)
    return made.model_copy(update={"rules": rules})


def _weight(layer: Layer) -> Tensor:
    return layer.weight.detach()


class _Run:
    """The state of one run on the copy."""

    def __init__(
        self, objective: Objective, layers: list[Layer], rules: dict[str, Rule | None], notes: list[str]
    ) -> None:
        self.objective, self.layers, self.rules, self.notes = objective, layers, rules, notes
        self.known: dict[str, dict[str, Tensor]] = {}
        self.reports: list[LayerReport] = []
        self.encoded: dict[str, Any] = {}
        self.solver = LayerSolver()

    def run(self, recipe: Recipe, kind: FisherKind, seed: int) -> ModuleReport:
        """Probe, solve, replace and measure."""
        before = self._dense_loss()
        self._probe(kind, seed)
        self._walk()
        for layer in self.layers:
            code = self.encoded.get(layer.name)
            if isinstance(code, LowRankCode):
                replace_module(self.objective.model, layer.name, factored(layer, code))
        weights = sum(report.shape[0] * report.shape[1] for report in self.reports)
        bits = sum(report.shape[0] * report.shape[1] * report.bits_per_weight for report in self.reports)
        return ModuleReport(
            module=self.objective.model,
            method=recipe.method,
            loss_before=before,
            loss_after=self.objective.value(),
            predicted_loss_increase=sum(report.predicted_loss_increase or 0.0 for report in self.reports),
            bits_per_weight=bits / weights,
            layers=self.reports,
            notes=self.notes,
            recipe=recipe.model_dump(mode="json", exclude_none=True),
            encoded=self.encoded,
        )

    def _dense_loss(self) -> float:
        """The loss as it is; layers that are called several times in a forward, or never, get a note."""
        calls: Counter[str] = Counter()

        def count(name: str, *_: object) -> None:
            calls[name] += 1

        hooks = [layer.module.register_forward_pre_hook(partial(count, layer.name)) for layer in self.layers]
        try:
            value = self.objective.value()
        finally:
            for hook in hooks:
                hook.remove()
        batches = sum(1 for _ in self.objective.data)
        for layer in self.layers:
            if calls[layer.name] > batches:
                several = "is called several times in a forward, and is solved for the inputs of its first call"
                self.notes.append(f"{layer.name}: {several}")
        return value

    def _probe(self, kind: FisherKind, seed: int) -> None:
        """What the loss feels of the dense model's layers."""
        needs = statistics_needed(self.rules)
        walk = GradientPass(self.objective, kind, seed=seed, apart=needs_samples(needs))
        sums = BackwardCollection(self.layers, needs)
        for passage in walk:
            sums.add(passage)
        for name in walk.others:
            layer = next(layer for layer in self.layers if layer.weight_name == name)
            self.layers.remove(layer)
            self.notes.append(f"{layer.name}: left as it is: its weight is used by another way than the layer's call")
        self.known = sums.values(walk.scale)

    def _walk(self) -> None:
        """Take all batches through the model, and solve each layer where it is reached."""
        objective = self.objective

        def forward(inputs: Any) -> None:
            objective.outputs_once(inputs)

        runs = [partial(forward, inputs) for inputs, _ in objective.batches()]
        name = type(objective.model).__name__
        block = Block(name, objective.model, tuple(self.layers))
        collection = InputCollection(list(by_statistic(statistics_needed(self.rules))), [], block, 0, Clock())
        with torch.no_grad():
            for layer, collected_at in layer_stops(runs, block, collection.collect, KeepInMemory(), torch.no_grad):
                self._solve(layer, collection.values(collected_at))
        solved = {report.name for report in self.reports}
        missed = [layer.name for layer in self.layers if layer.name not in solved]
        self.notes += [f"{name}: left as it is: it is never called" for name in missed]
        if not self.reports:
            raise UnsupportedModelError(f"{name} calls none of its layers: nothing was compressed")

    def _solve(self, layer: Layer, values: dict[str, Any]) -> None:
        rule = self.rules[layer.name]
        assert rule is not None
        weight, dtype = layer.weight.detach().float(), layer.parameter.dtype
        constraint = rule.constraint.build().stored_as(torch.float32 if dtype == torch.float64 else dtype)
        statistics = {**values, **self.known.get(layer.name, {})}
        problem = LayerProblem(layer.name, weight, statistics, rule, constraint)
        solved = self.solver.solve(problem)
        stored = solved.solution.weight.to(dtype)
        layer.replace(stored)
        bits = constraint.bits_per_weight(weight.shape)
        report, notes = layer_report(problem, solved, stored.float(), bits)
        self.reports.append(report)
        self.notes += [*solved.notes, *notes]
        self.encoded[layer.name] = solved.solution.encoded
