"""What a run is going to do, settled and checked before anything is computed."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from hesse.compression.layers import check_products
from hesse.compression.output import companion_notes
from hesse.compression.shared_sparsity import check_shape, with_own_shares
from hesse.compression.targets import check_served
from hesse.compression.tokens import Calibration, factor_tokens, sample_length, select_samples
from hesse.compression.weight_fisher import FisherNeeds
from hesse.data import Samples
from hesse.errors import CheckpointError, OptionError
from hesse.estimation import Statistics
from hesse.formats import Format, StoredLayer, choose_format, open_checkpoint
from hesse.methods.curvatures import Statistic
from hesse.methods.recipe import Recipe, Rule, matches
from hesse.models.checkpoint import Checkpoint
from hesse.models.network import Network


@dataclass(frozen=True, eq=False)
class Plan:
    """The model, each layer's rule, how the result is stored, and the samples."""

    model: Path
    recipe: Recipe
    calibration: Calibration
    statistics: Statistics | None  # curvature that was estimated before, in place of `samples`
    checkpoint: Checkpoint
    dense: Network  # in float32
    network: Network  # the same modules, in the type that calibration runs in
    rules: dict[str, Rule | None]  # by layer; None for those left as they are
    format: Format
    samples: Samples  # to calibrate on
    probes: Samples  # some of them, for the sensitivities
    check: Samples  # to measure the result with
    held_out: bool  # whether `check` is no part of `samples`
    seen: Samples | None  # as many as `check` that layers are solved for; None if nothing is held out, or calibrated
    notes: list[str]  # departures from what was asked

    @property
    def length(self) -> int:
        """Tokens of the longest sample."""
        return max(len(ids) for ids in self.samples.ids)


def make_plan(
    model: Path,
    recipe: Recipe,
    calibration: Calibration,
    statistics: Statistics | None,
    format_name: str,
    device: torch.device,
    target: str | None = None,
) -> Plan:
    """Open the model folder `model` and settle everything.

    With a `target`, that loader serves every layer. With `statistics` the samples only check the result; without data
    of their own they are those of the statistics.

    Raises:
        HesseError: something is wrong with the model, the data, the statistics or the options.
    """
    checkpoint, dense, network = open_networks(model, device)
    rules = _rules(network, recipe)
    for rule in recipe.rules:
        check_products(rule)
    format = _format(format_name, network, rules)
    if target is not None:
        check_served(target, network, {layer.name: format.constraint(layer.name) for layer in network.layers})
    if statistics is not None:
        statistics.check_model(checkpoint)
        statistics.check_holds("gram")
        calibration = statistics_calibration(statistics, calibration)
    whole = whole_factors(rules)
    outputs = [layer.weight.shape[0] for layer in network.layers if layer.name in whole]
    fisher = fisher_needs(rules)
    if statistics is not None and fisher.of_samples:
        raise OptionError("--curvature has no blocks or gradients of the Fisher, which this method needs: leave it out")
    if statistics is not None and fisher.diagonals:
        statistics.check_holds("fisher")
    probed = factor_tokens(outputs, any(fisher))
    if fisher.gradients:  # one of each sample
        probed = max(probed, calibration.samples * sample_length(network, calibration.length))
    selected = select_samples(model, calibration, network, probed)
    samples = selected.samples
    calibrated = bool(_needing(rules, "inputs"))
    if statistics is not None:
        same = calibration == statistics_calibration(statistics, replace(calibration, data=None))
        if same:
            statistics.check_samples(samples)
        calibrated = calibrated and same
    if statistics is not None or not calibrated:
        samples = selected.probes  # only the prediction looks at them
    seen = samples.first(len(selected.check.ids))
    return Plan(
        model=model,
        recipe=recipe,
        calibration=calibration,
        statistics=statistics,
        checkpoint=checkpoint,
        dense=dense,
        network=network,
        rules=rules,
        format=format,
        samples=samples,
        probes=selected.probes,
        check=selected.check,
        held_out=selected.held_out,
        seen=seen if selected.held_out and calibrated else None,
        notes=[*format.notes, *selected.notes, *companion_notes(model)],
    )


def whole_factors(rules: dict[str, Rule | None]) -> set[str]:
    """The layers whose rule needs all of E[ggᵀ] at their outputs."""
    return _needing(rules, "output factor")


def fisher_needs(rules: dict[str, Rule | None]) -> FisherNeeds:
    """The layers whose rule needs the Fisher on their weights."""
    return FisherNeeds(*(_needing(rules, kind) for kind in ("fisher diagonal", "fisher blocks", "fisher gradients")))


def _needing(rules: dict[str, Rule | None], statistic: Statistic) -> set[str]:
    return {name for name, rule in rules.items() if rule is not None and statistic in rule.kind.needs}


def statistics_calibration(statistics: Statistics, asked: Calibration) -> Calibration:
    """What to check the result with: `asked`, or without data the samples that the statistics are of."""
    if asked.data is not None:
        return replace(asked, samples=1)
    return Calibration(batch_size=asked.batch_size, **statistics.content["samples"])


def open_networks(model: Path, device: torch.device) -> tuple[Checkpoint, Network, Network]:
    """A dense checkpoint, and its network in float32 and in the type that calibration runs in.

    Raises:
        HesseError: the model is damaged, of no known kind, or compressed already.
    """
    checkpoint = open_checkpoint(model)
    if type(checkpoint) is not Checkpoint:
        raise CheckpointError(f"{model} is compressed already: start from the dense model it was made from")
    dense = Network(checkpoint, torch.float32, device)
    return checkpoint, dense, dense.in_dtype(_compute_dtype(checkpoint, dense, device))


def _compute_dtype(checkpoint: Checkpoint, network: Network, device: torch.device) -> torch.dtype:
    """The type that calibration runs in: the weights' own where the device multiplies it at speed, else float32."""
    stored = checkpoint.dtype(f"{network.layers[0].name}.weight")
    if device.type == "cuda":
        return stored
    native = torch.cpu.get_capabilities()
    fast = stored == torch.bfloat16 and any(native.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if fast else torch.float32


def _rules(network: Network, recipe: Recipe) -> dict[str, Rule | None]:
    """The rule of each linear layer of the blocks; None for those left as they are.

    Raises:
        OptionError: a pattern matches nothing, or nothing is left to compress.
    """
    check_patterns(network, (*recipe.ignore, *(p for rule in recipe.rules for p in rule.layers)))
    rules = {layer.name: recipe.rule_for(layer.name) for layer in network.layers}
    if not any(rules.values()):
        raise OptionError("no layer is left to compress: leave out an --ignore, or widen the recipe's patterns")
    return with_own_shares(network, rules)


def check_patterns(network: Network, patterns: tuple[str, ...]) -> None:
    """Raise OptionError for a pattern that matches nothing."""
    names = [layer.name for layer in network.layers]
    known = [*names, *(name for name, _ in network.model.named_modules())]
    for pattern in patterns:
        if not any(matches(name, pattern) for name in known):
            raise OptionError(f"the pattern {pattern!r} matches no layer of this model; a layer's name is {names[0]}")


def _format(name: str, network: Network, rules: dict[str, Rule | None]) -> Format:
    """The format, once every layer's constraint has been seen to fit its shape."""
    stored = []
    for layer in network.layers:
        rule, shape = rules[layer.name], layer.weight.shape
        constraint = None if rule is None else rule.constraint.build()
        if constraint is not None:
            check_shape(layer, constraint)
        stored.append(StoredLayer(layer.name, shape, constraint, layer.transposed))
    return choose_format(name, network, stored)
