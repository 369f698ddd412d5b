"""Compress a network in memory: collect backward statistics, then solve each layer where calibration stops at it."""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hesse.constraints import Constraint, LowRankCode
from hesse.curvature import Loss, Objective
from hesse.data.batches import check_batches, token_ids, unpadded_ids
from hesse.data.selection import Calibration
from hesse.errors import OptionError, UnsupportedModelError
from hesse.estimation.calibrated import KnownStatistics, calibrated
from hesse.estimation.statistics import (
    STATISTICS,
    BackwardCollection,
    BlockStatistic,
    Needs,
    by_statistic,
    needs_samples,
)
from hesse.layerwise.layer_solver import LayerSolver
from hesse.layerwise.rules import Rules, rules_for, statistics_needed
from hesse.layerwise.solved_layer import SolvedLayer, solve_layer
from hesse.methods import DEFAULT_METHOD, Options, Recipe, Rule, find_method
from hesse.modules.preparation import copy_model, layers_objective
from hesse.modules.report import ModuleReport
from hesse.modules.token_stream import TokenStream
from hesse.networks.factored import factorize_layer, replace_module
from hesse.networks.layout import kind_of
from hesse.networks.module_network import SingleBlock
from hesse.networks.network import Blocks, Layer
from hesse.passes.module_batch import ModuleBatch
from hesse.passes.per_sample import FisherKind, GradientPass
from hesse.passes.stream import CalibrationBatch
from hesse.progress import Clock
from hesse.result import LossChange, Result


@torch.inference_mode(False)
@torch.enable_grad()
def compress_in_memory(
    model: nn.Module,
    data: Any,
    *,
    method: str = DEFAULT_METHOD,
    recipe: Recipe | None = None,
    options: Options | None = None,
    layers: Sequence[str] = ("*",),
    ignore: Sequence[str] = (),
    loss_function: Loss | nn.Module | None = None,
    forward: Callable[[nn.Module, Any], Tensor] | None = None,
    kind: FisherKind = "sampled",
    samples: int = 128,
    length: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    bos: bool | None = None,
) -> Result[ModuleReport]:
    """Prune, quantise or factorise the layers of any `torch.nn.Module`; `model` itself is left as it is.

    A transformers language model whose `data` is text or token ids is compressed block by block, by the same passes as
    a checkpoint on disk: every method has a meaning but those that rewrite the model or round its inputs. For other
    data, and for any other module, the whole network is one block, and the loss is `loss_function` of its outputs.

    Layers are nn.Linear, nn.Conv1d and nn.Conv2d without groups, transformers' Conv1D, and the `q_proj`, `k_proj` and
    `v_proj` that an nn.MultiheadAttention keeps in one weight; a convolution is the matrix (out, in · kernel) that its
    patches are multiplied by. Embeddings, norms and weights that two modules share stay. Backward statistics are of
    the dense model; then all batches go through the copy together, stop at each layer, and go on through the solved
    one, so that later layers see inputs that the earlier, changed ones make. The activations of all batches are in
    memory.

    A factorised layer is replaced by two smaller ones (nn.Linear + nn.Linear, or a convolution and one with a
    kernel of 1). All other results are stored dense in the layer's type: zeros, or exactly what codes and scales stand
    for, which are in the report.

    Args:
        model: it is copied, and the copy is run in eval mode.
        data: (inputs, targets) pairs, dictionaries with `labels`, a DataLoader of either; for a transformers language
            model also lists of token ids, a text file, or a `datasets.Dataset` with `input_ids`. Read once and kept.
        method: a row of `hesse methods`, changed by `options`; or give a whole `recipe` instead.
        recipe: what to do per layer, from `hesse.load_recipe` or built in Python.
        options: options such as `Options(bits=3, group_size=64)`; None keeps the method's default.
        layers: patterns of the names of layers to change, as `model.named_modules()` has them.
        ignore: patterns of those to leave as they are.
        loss_function: a Loss of `hesse.curvature`, or torch's CrossEntropyLoss or MSELoss; None for cross-entropy.
        forward: `forward(model, inputs)` gives the outputs; by default `model(inputs)`, of a dictionary
            `model(**inputs)`, and of a transformers model the logits.
        kind: "sampled" for the true Fisher, "empirical" for that of the data's own targets, which any loss has.
        samples: samples to take from a text.
        length: tokens per sample of a text; None for 2048 or the model's positions, whichever is less.
        seed: of the choice of samples and of sampled labels.
        batch_size: samples of token ids that go through the model together.
        bos: start windows of text with BOS, or not; None for what the tokenizer does.

    Returns:
        The changed copy, what was done to each layer, and the loss before, predicted and measured.

    Raises:
        HesseError: the message says what is wrong and what to do. Options that do not fit a layer are refused
            before the model is run.
    """
    wanted = _recipe(method, recipe, options, layers, ignore)
    if wanted.rewrite is not None:
        raise OptionError(
            f"{wanted.rewrite} rewrites language models on disk, not modules: save the model and give the folder, or "
            "choose another method"
        )
    if any(rule.input_bits is not None for rule in wanted.rules):
        raise OptionError(
            "inputs are rounded in language models on disk, by the programs that load them, and not in modules: leave "
            "out the bits of inputs, or save the model and give the folder"
        )
    clock = Clock()
    with copy_model(model) as (copy, found, notes):
        tokens, data = _token_data(copy, data, loss_function, forward)
        if tokens:
            assert isinstance(copy, PreTrainedModel)
            found = TokenStream.layers_in_blocks(copy, found)
        shapes = {layer.name: layer.weight.shape for layer in found}
        weights = {layer.name: partial(_weight, layer) for layer in found}
        rules = rules_for(wanted, weights, shapes, (name for name, _ in copy.named_modules()))
        chosen = [layer for layer in found if rules[layer.name] is not None]
        if tokens:
            assert isinstance(copy, PreTrainedModel)
            calibration = Calibration(data, samples, length, seed, batch_size, bos)
            source: _Source = TokenStream(copy, chosen, calibration, statistics_needed(rules), clock)
            return _compress(source, chosen, rules, wanted, notes, clock)
        with layers_objective(copy, chosen, data, loss_function, forward) as objective:
            source = _OneBlock(objective, chosen, statistics_needed(rules), kind, seed)
            return _compress(source, chosen, rules, wanted, notes, clock)


class _Source(Protocol):
    """A network in memory with its data."""

    layers: list[Layer]  # those that can be changed, after `known`
    notes: list[str]
    held_out: bool  # the loss is of other data than the statistics

    @property
    def model(self) -> nn.Module:
        """The copy that is changed."""

    def loss(self) -> float:
        """Return the loss of the model as it is."""

    def known(self) -> KnownStatistics:
        """Collect the backward statistics."""

    def blocks(self) -> tuple[Blocks, Sequence[CalibrationBatch]]:
        """Return the network and the batches at its first block."""


def _compress(
    source: _Source, layers: list[Layer], rules: Rules, recipe: Recipe, notes: list[str], clock: Clock
) -> Result[ModuleReport]:
    """Collect, solve, replace and measure."""
    storage, solver = _InPlace(layers, rules), LayerSolver()
    before = source.loss()
    with clock.phase("probe"):
        known = source.known()
    needs = {layer.name: statistics_needed(rules)[layer.name] for layer in source.layers}
    solutions: dict[str, SolvedLayer] = {}
    network, batches = source.blocks()
    unreached: list[str] = []
    with torch.no_grad():
        for _, layer, statistics in calibrated(network, batches, needs, known=known, clock=clock):
            rule = rules[layer.name]
            assert rule is not None
            if statistics.called:
                solutions[layer.name] = solve_layer(layer, statistics, rule, storage, solver, clock)
            else:
                unreached.append(f"{layer.name}: left as it is: it is never called")
    notes = [*notes, *source.notes, *(note for each in solutions.values() for note in each.notes), *unreached]
    if not solutions:
        raise UnsupportedModelError(f"{type(source.model).__name__} calls none of its layers: nothing was compressed")
    for layer in source.layers:
        if layer.name in solutions and isinstance(code := solutions[layer.name].encoded, LowRankCode):
            replace_module(source.model, layer.name, factorize_layer(layer, code))
    reports = [solution.report for solution in solutions.values()]
    weights = sum(report.shape[0] * report.shape[1] for report in reports)
    bits = sum(report.shape[0] * report.shape[1] * report.bits_per_weight for report in reports)
    after, predicted = source.loss(), sum(report.predicted_loss_increase or 0.0 for report in reports)
    change = LossChange(
        name="the loss of the changed model less that of the dense one",
        unit="of the loss, a term",
        predicted=predicted,
        measured=after - before,
        held_out=source.held_out,
    )
    report = ModuleReport(
        model=type(source.model).__name__,
        method=recipe.method,
        loss=change,
        loss_before=before,
        loss_after=after,
        predicted_loss_increase=predicted,
        bits_per_weight=bits / weights,
        layers=reports,
        notes=notes,
        seconds={"total": clock.total, **clock.seconds},
        recipe=recipe.model_dump(mode="json", exclude_none=True),
        encoded={name: solution.encoded for name, solution in solutions.items()},
    )
    return Result(report, source.model)


class _InPlace:
    """Stores solved layers where they are, dense in their own type."""

    def __init__(self, layers: Sequence[Layer], rules: Rules) -> None:
        self._layers, self._rules = {layer.name: layer for layer in layers}, rules
        self._shapes = {layer.name: layer.weight.shape for layer in layers}

    def constraint(self, name: str) -> Constraint | None:
        rule, dtype = self._rules[name], self._layers[name].parameter.dtype
        if rule is None:
            return None
        return rule.constraint.build().stored_as(torch.float32 if dtype == torch.float64 else dtype)

    def as_stored(self, name: str, encoded: Any, weight: Tensor) -> Tensor:
        return weight.to(self._layers[name].parameter.dtype)

    def stored_bits(self, name: str) -> float:
        constraint = self.constraint(name)
        assert constraint is not None
        return constraint.bits_per_weight(self._shapes[name])


class _OneBlock:
    """Any module as one block, with the loss of an objective."""

    held_out = False

    def __init__(self, objective: Objective, layers: list[Layer], needs: Needs, kind: FisherKind, seed: int) -> None:
        self.objective, self.model, self.layers, self.notes = objective, objective.model, list(layers), list[str]()
        self._needs, self._kind, self._seed = needs, kind, seed
        self._counted = False
        if block := [
            name
            for name in by_statistic(needs)
            if isinstance(STATISTICS[name], BlockStatistic) or name == "weighted inputs"
        ]:
            raise OptionError(
                f"the {block[0]} is of the attention of a transformers language model that is given text or token ids: "
                "give these, or use curvature gram or kronecker"
            )

    def loss(self) -> float:
        """Return the loss; at the first time note the layers that are called several times in a forward."""
        if self._counted:
            return self.objective.value()
        self._counted = True
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
        several = "is called several times in a forward, and is solved for the inputs of its first call"
        self.notes += [f"{layer.name}: {several}" for layer in self.layers if calls[layer.name] > batches]
        return value

    def known(self) -> KnownStatistics:
        """Collect the backward statistics; leave out layers whose weight is used by another way than a call."""
        gradients = GradientPass(self.objective, self._kind, seed=self._seed, apart=needs_samples(self._needs))
        collection = BackwardCollection(self.layers, self._needs)
        for recorded in gradients:
            collection.add(recorded)
        for name in gradients.others:
            layer = next(layer for layer in self.layers if layer.weight_name == name)
            self.layers.remove(layer)
            self.notes.append(f"{layer.name}: left as it is: its weight is used by another way than the layer's call")
        return collection.values(gradients.scale)

    def blocks(self) -> tuple[Blocks, Sequence[CalibrationBatch]]:
        """Return the module as one block, and the objective's batches."""
        batches = [ModuleBatch(self.objective, inputs) for inputs, _ in self.objective.batches()]
        return SingleBlock(self.model, self.layers), batches


def _recipe(
    method: str, recipe: Recipe | None, options: Options | None, layers: Sequence[str], ignore: Sequence[str]
) -> Recipe:
    if recipe is not None:
        if options is not None or ignore or tuple(layers) != ("*",):
            raise OptionError("a recipe says everything itself: leave out options, layers and ignore")
        return recipe
    made = find_method(method, "compress").recipe(options or Options(), tuple(ignore))
    rules: tuple[Rule, ...] = tuple(rule.model_copy(update={"layers": tuple(layers)}) for rule in made.rules)
    return made.model_copy(update={"rules": rules})


def _token_data(
    model: nn.Module,
    data: Any,
    loss_function: Loss | nn.Module | None,
    forward: Callable[[nn.Module, Any], Tensor] | None,
) -> tuple[bool, Any]:
    """Return True and text or token ids, if that is what a language model is given; else False and the data."""
    language_model = isinstance(model, PreTrainedModel) and kind_of(model) == "causal-lm"
    if language_model and loss_function is None and forward is None:
        if data is None or (ids := token_ids(data)) is not None:
            return True, None if data is None else ids
        check_batches(data)
        data = list(data)
        if (samples := unpadded_ids(data)) is not None:
            return True, samples
    elif data is None or isinstance(data, str | Path):
        raise OptionError(
            "text is for a transformers language model with its own loss: give (inputs, targets) pairs, or "
            "dictionaries with labels"
        )
    check_batches(data)
    return False, data


def _weight(layer: Layer) -> Tensor:
    return layer.weight.detach()
