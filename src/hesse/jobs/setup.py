"""Plan of a compression, made and checked before anything is computed."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from hesse.checkpoints.checkpoint import Checkpoint
from hesse.checkpoints.output import companion_notes
from hesse.data import Samples
from hesse.data.selection import Calibration, sample_length, select_samples
from hesse.errors import OptionError
from hesse.estimation import Statistics
from hesse.estimation.statistics import STATISTICS, by_statistic, probe_tokens
from hesse.formats import DenseFormat, StoredLayer, choose_format, open_networks
from hesse.formats.planned import planned_obstacle
from hesse.formats.targets import check_inputs, check_served
from hesse.layerwise.rules import fitting, reads_inputs, rules_for, statistics_needed
from hesse.methods.recipe import Recipe, Rule
from hesse.networks.network import CheckpointNetwork, Layer
from hesse.networks.unchanged import unchanged_notes
from hesse.rewriting import Rewriting


@dataclass(frozen=True, eq=False)
class Setup:
    """Plan of a compression: the model, each layer's rule, the format of the result, and the samples."""

    model: Path
    recipe: Recipe
    calibration: Calibration
    statistics: Statistics | None  # estimated before, in place of `samples`
    checkpoint: Checkpoint
    original: CheckpointNetwork  # the model as on disk, in float32
    rewriting: Rewriting | None  # applied first; `checkpoint` is then the rewritten one
    dense: CheckpointNetwork  # of `checkpoint`, in float32
    network: CheckpointNetwork  # the same modules, in the type that calibration runs in
    rules: dict[str, Rule | None]  # by layer; None for unchanged layers
    format: DenseFormat
    samples: Samples  # to calibrate on
    probes: Samples  # the first of `samples`, for the backward statistics
    check: Samples  # to measure the result with
    held_out: bool  # `check` is not a part of `samples`
    seen: Samples | None  # calibration samples, as many as `check`; None if nothing is held out, or calibrated
    notes: list[str]  # departures from the options

    @property
    def length(self) -> int:
        """Return the number of tokens of the longest sample."""
        return self.samples.longest


def open_setup(
    model: Path,
    recipe: Recipe,
    calibration: Calibration,
    statistics: Statistics | None,
    format_name: str,
    device: torch.device,
    target: str | None = None,
) -> Setup:
    """Open the model folder `model`, and make and check the plan.

    With a `target`, that loader serves every layer. With `statistics` the samples only check the result; without data
    of their own they are those of the statistics.

    Raises:
        HesseError: something is wrong with the model, the data, the statistics or the options.
    """
    checkpoint, original, network = open_networks(model, device)
    rewriting, dense = None, original
    if recipe.rewrite is not None:
        if statistics is not None:
            raise OptionError(
                f"--statistics is of {model} before it is rewritten ({recipe.rewrite}): leave it out, or use `hesse "
                "rotate` first, estimate on what it writes, and compress that"
            )
        if any((sparse := rule.constraint.sparse) and sparse.scope in ("global", "lamp") for rule in recipe.rules):
            raise OptionError(
                f"shares over all layers are counted before a model is rewritten ({recipe.rewrite}): use the scope "
                "layer or row, or `hesse rotate` first"
            )
        rewriting = Rewriting(recipe.rewrite, original)
        checkpoint = rewriting.checkpoint
        dense = CheckpointNetwork(checkpoint, torch.float32, device)
        network = dense.in_dtype(network.dtype)
    rules = _rules(network, recipe)
    format = _format(format_name, network, rules)
    if target is not None:
        check_served(target, network, {layer.name: format.constraint(layer.name) for layer in network.layers})
        for name, layer in format.layers.items():
            check_inputs(target, name, layer.constraint, layer.input_bits)
    if statistics is not None:
        statistics.check_model(checkpoint)
        calibration = statistics_calibration(statistics, calibration)
    needs = statistics_needed(rules)
    for name, layers in by_statistic(needs).items():
        if statistics is not None:
            STATISTICS[name].check_folder(statistics)
        else:
            STATISTICS[name].check_network(network, layers)
    calibration_tokens = calibration.samples * sample_length(network, calibration.length)
    probed = probe_tokens(needs, network.layers, calibration_tokens)
    selected = select_samples(model, calibration, network, probed)
    samples = selected.samples
    calibrated = reads_inputs(rules) or (rewriting is not None and rewriting.learns)
    if statistics is not None:
        same = calibration == statistics_calibration(statistics, replace(calibration, data=None))
        if same:
            statistics.check_samples(samples)
        calibrated = calibrated and same
    if statistics is not None or not calibrated:
        samples = selected.probes  # only the prediction uses them
    seen = samples.first(len(selected.check.ids))
    return Setup(
        model=model,
        recipe=recipe,
        calibration=calibration,
        statistics=statistics,
        checkpoint=checkpoint,
        original=original,
        rewriting=rewriting,
        dense=dense,
        network=network,
        rules=rules,
        format=format,
        samples=samples,
        probes=selected.probes,
        check=selected.check,
        held_out=selected.held_out,
        seen=seen if selected.held_out and calibrated else None,
        notes=[*format.notes, *unchanged_notes(network), *selected.notes, *companion_notes(model)],
    )


def statistics_calibration(statistics: Statistics, asked: Calibration) -> Calibration:
    """Return the samples to check the result with: `asked`, or without data those of the statistics."""
    if asked.data is not None:
        return replace(asked, samples=1)
    return Calibration(batch_size=asked.batch_size, **statistics.content["samples"])


def _rules(network: CheckpointNetwork, recipe: Recipe) -> dict[str, Rule | None]:
    """Return the rule of each linear layer of the blocks; None for unchanged layers."""

    def read(layer: Layer) -> Tensor:
        stored = network.tensors.read([f"{layer.name}.weight"])[f"{layer.name}.weight"]
        return stored.T if layer.transposed else stored

    shapes = {layer.name: layer.weight.shape for layer in network.layers}
    weights = {layer.name: partial(read, layer) for layer in network.layers}
    return rules_for(recipe, weights, shapes, (name for name, _ in network.model.named_modules()))


def _format(name: str, network: CheckpointNetwork, rules: dict[str, Rule | None]) -> DenseFormat:
    """Return the format that stores every layer under its rule's constraint, and that transformers loads.

    Raises:
        OptionError: transformers would not load the requested format; with `auto` the weights are stored dense then.
    """
    stored = []
    for layer in network.layers:
        constraint = fitting(rules[layer.name], layer.name, layer.weight.shape)
        rule = rules[layer.name]
        inputs = None if rule is None else rule.input_bits
        stored.append(StoredLayer(layer.name, layer.weight.shape, constraint, layer.transposed, inputs))
    format = choose_format(name, network, stored)
    why = planned_obstacle(format)
    if why is None:
        return format
    if name != "auto" or type(format) is DenseFormat:
        raise OptionError(f"{format.name} weights of {type(network.model).__name__} would not load: {why}")
    dense = choose_format(DenseFormat.name, network, stored)
    dense.notes.append(f"weights are stored dense, and take no less room: {why}")
    return dense
