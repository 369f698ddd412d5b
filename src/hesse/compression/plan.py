"""What a run is going to do, settled and checked before anything is computed."""

from dataclasses import dataclass
from pathlib import Path

import torch

from hesse.data import Samples, read_samples
from hesse.errors import CheckpointError, HesseError, OptionError
from hesse.evaluation.evaluate import check_ids
from hesse.formats import Format, StoredLayer, choose_format, open_checkpoint
from hesse.methods.recipe import Recipe, Rule, matches
from hesse.models.checkpoint import Checkpoint
from hesse.models.network import Network

DEFAULT_LENGTH = 2048
PROBE_TOKENS = 1024  # for the sensitivities, and again for the check; at least two samples each


@dataclass(frozen=True)
class Calibration:
    """Which tokens a run looks at, and in what portions."""

    data: str | Path | list[list[int]] | None
    samples: int
    length: int | None  # None: as many as the model has positions for, at most DEFAULT_LENGTH
    seed: int
    batch_size: int | None


@dataclass(frozen=True, eq=False)
class Plan:
    """The model, each layer's rule, how the result is stored, and the samples."""

    model: Path
    recipe: Recipe
    calibration: Calibration
    checkpoint: Checkpoint
    dense: Network  # in float32
    network: Network  # the same modules, in the type that calibration runs in
    rules: dict[str, Rule | None]  # by layer; None for those left as they are
    format: Format
    samples: Samples  # to calibrate on
    probes: Samples  # some of them, for the sensitivities
    check: Samples  # to measure the result with
    held_out: bool  # whether `check` is no part of `samples`
    notes: list[str]  # departures from what was asked


def make_plan(model: Path, recipe: Recipe, calibration: Calibration, format_name: str, device: torch.device) -> Plan:
    """Open the model folder `model` and settle everything.

    Raises:
        HesseError: something is wrong with the model, the data or the options.
    """
    checkpoint = open_checkpoint(model)
    if type(checkpoint) is not Checkpoint:
        raise CheckpointError(f"{model} is compressed already: start from the dense model it was made from")
    dense = Network(checkpoint, torch.float32, device)
    network = dense.in_dtype(_compute_dtype(checkpoint, dense, device))
    rules = _rules(network, recipe)
    format = _format(format_name, network, rules)
    samples, reserved = _samples(model, calibration, network)
    probes = Samples(samples.ids[: _probe_count(len(samples.ids[0]))], samples.source, samples.exact)
    if all(rule is None or rule.curvature == "identity" for rule in rules.values()):
        samples = probes  # only the prediction looks at them
    check_ids(network, samples.batches(1))
    notes = list(format.notes)
    asked, length = calibration.length, sample_length(network, calibration.length)
    if asked is not None and asked > length and not samples.exact:
        notes.append(f"samples have {length} tokens, not {asked}: the model has positions for no more")
    return Plan(
        model=model,
        recipe=recipe,
        calibration=calibration,
        checkpoint=checkpoint,
        dense=dense,
        network=network,
        rules=rules,
        format=format,
        samples=samples,
        probes=probes,
        check=reserved if reserved.ids else probes,
        held_out=bool(reserved.ids),
        notes=notes,
    )


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
    names = [layer.name for layer in network.layers]
    known = [*names, *(name for name, _ in network.model.named_modules())]
    for pattern in (*recipe.ignore, *(p for rule in recipe.rules for p in rule.layers)):
        if not any(matches(name, pattern) for name in known):
            raise OptionError(f"the pattern {pattern!r} matches no layer of this model; a layer's name is {names[0]}")
    rules = {name: recipe.rule_for(name) for name in names}
    if not any(rules.values()):
        raise OptionError("no layer is left to compress: leave out an --ignore, or widen the recipe's patterns")
    return rules


def _format(name: str, network: Network, rules: dict[str, Rule | None]) -> Format:
    """The format, once every layer's constraint has been seen to fit its shape."""
    stored = []
    for layer in network.layers:
        rule, shape = rules[layer.name], layer.weight.shape
        constraint = None if rule is None else rule.constraint.build()
        if constraint is not None:
            try:
                constraint.check(shape)
            except HesseError as error:
                raise type(error)(f"{layer.name}: {error}") from None
        stored.append(StoredLayer(layer.name, shape, constraint, layer.transposed))
    return choose_format(name, network, stored)


def _samples(model: Path, calibration: Calibration, network: Network) -> tuple[Samples, Samples]:
    """Samples to calibrate on, and others to check the result with (none where the data gives ready tokens)."""
    length = sample_length(network, calibration.length)
    return read_samples(
        calibration.data,
        model,
        count=calibration.samples,
        length=length,
        seed=calibration.seed,
        purpose="calibration",
        limit=network.input_limit,
        reserve=_probe_count(length),
    )


def _probe_count(length: int) -> int:
    return max(PROBE_TOKENS // length, 2)


def sample_length(network: Network, asked: int | None) -> int:
    """Tokens a sample: as asked, but no more than the model has positions for."""
    wanted = DEFAULT_LENGTH if asked is None else asked
    return wanted if network.input_limit is None else min(wanted, network.input_limit)
