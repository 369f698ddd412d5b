"""Compress a network in memory: collect backward statistics, then solve each layer where calibration stops at it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hesse.constraints import Constraint, LowRankCode
from hesse.curvature import Loss
from hesse.data.batches import check_batches, token_ids, unpadded_ids
from hesse.data.selection import SAMPLES, Calibration
from hesse.errors import OptionError, UnsupportedModelError
from hesse.estimation.calibrated import calibrated
from hesse.layerwise.layer_solver import LayerSolver
from hesse.layerwise.rules import Rules, layer_rules, statistics_needed
from hesse.layerwise.solved_layer import SolvedLayer, solve_layer
from hesse.methods import DEFAULT_METHOD, Options, Recipe, find_method
from hesse.modules.networks_in_memory import OneBlock, TokenStream
from hesse.modules.preparation import copy_model, layers_objective
from hesse.modules.report import ModuleReport
from hesse.networks.factored import factorize_layer, replace_module
from hesse.networks.layout import is_language_model
from hesse.networks.network import Layer
from hesse.passes.per_sample import FisherKind
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
    samples: int | None = None,
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
        samples: samples to take from a text or token ids; None for 128.
        length: tokens per sample of these; None for 2048 or the model's positions, whichever is less.
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
        rules = layer_rules(wanted, found, copy)
        chosen = [layer for layer in found if rules[layer.name] is not None]
        if tokens:
            assert isinstance(copy, PreTrainedModel)
            calibration = Calibration(data, SAMPLES if samples is None else samples, length, seed, batch_size, bos)
            stream = TokenStream(copy, chosen, calibration, statistics_needed(rules), clock)
            return _compress(stream, chosen, rules, wanted, notes, clock)
        for name, value in {"samples": samples, "length": length, "batch_size": batch_size, "bos": bos}.items():
            if value is not None:
                raise OptionError(f"{name} is for text and token ids: leave it out, batches are taken as given")
        with layers_objective(copy, chosen, data, loss_function, forward) as objective:
            block = OneBlock(objective, chosen, statistics_needed(rules), kind, seed)
            return _compress(block, chosen, rules, wanted, notes, clock)


def _compress(
    source: OneBlock | TokenStream, layers: list[Layer], rules: Rules, recipe: Recipe, notes: list[str], clock: Clock
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


def _recipe(
    method: str, recipe: Recipe | None, options: Options | None, layers: Sequence[str], ignore: Sequence[str]
) -> Recipe:
    if recipe is not None:
        if options is not None or ignore or tuple(layers) != ("*",):
            raise OptionError("a recipe says everything itself: leave out options, layers and ignore")
        return recipe
    return find_method(method, "compress").recipe(options or Options(), tuple(ignore), tuple(layers))


def _token_data(
    model: nn.Module,
    data: Any,
    loss_function: Loss | nn.Module | None,
    forward: Callable[[nn.Module, Any], Tensor] | None,
) -> tuple[bool, Any]:
    """Return True and text or token ids, if that is what a language model is given; else False and the data."""
    if is_language_model(model) and loss_function is None and forward is None:
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
