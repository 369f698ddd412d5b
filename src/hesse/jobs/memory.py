"""Bound the memory of a run, and keep it within a limit."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil

from hesse.data.selection import PROBE_TOKENS
from hesse.errors import OptionError
from hesse.estimation.statistics import STATISTICS, BackwardStatistic, BlockStatistic
from hesse.estimation.statistics.attention_factor import layers_of_attention
from hesse.evaluation.evaluate import LOGITS_HELD
from hesse.jobs.setup import Setup
from hesse.layerwise.rules import statistics_needed
from hesse.layerwise.workspace import collecting_bytes, layer_bytes
from hesse.networks.families import expert_number, is_expert
from hesse.networks.layout import vocabulary
from hesse.networks.network import Block, CheckpointNetwork, Layer
from hesse.passes.backward import ACTIVATIONS_HELD
from hesse.passes.stream import calibration_batch, evaluation_batch

COMPARING = "compare the result with the dense model"
LATER = 200 << 20  # bytes that libraries take on first use: compiled loops, thread pools, their buffers
USED_OF_FREE = 0.8
SHARE_FREE = 0.05  # share of freed memory that the allocator keeps


@dataclass(frozen=True)
class MemoryBound:
    """Batch size and offloading of a run, and the resulting bound of its memory."""

    bound: int  # bytes
    batch_size: int  # samples per calibration batch
    offloads: bool  # whether what a block holds for waiting samples is in files
    largest: str  # the phase that needs the most memory

    def sentence(self) -> str:
        """Return the message that is shown before the run."""
        where = "on disk" if self.offloads else "in memory"
        samples = "1 sample" if self.batch_size == 1 else f"{self.batch_size} samples"
        return (
            f"at most {shown_bytes(self.bound)} of memory, needed to {self.largest}; {samples} at a time, "
            f"activations inside a block {where}"
        )


def fit_memory(setup: Setup, limit: int | None, batch_size: int | None = None) -> MemoryBound:
    """The fastest way to run `setup` in at most `limit` bytes; without a limit, in what is free now if that will do.

    A given `batch_size` is not changed.

    Raises:
        OptionError: the limit is too small; the message says how much is enough.
    """
    usual = batch_size or setup.calibration.batch_size or calibration_batch(setup.length)
    usual = min(usual, len(setup.samples.ids))
    choices = [(usual, False), (usual, True), *([] if batch_size else [(1, True)])]
    found = [_bound(setup, size, paused) for size, paused in choices]
    for choice in found:
        if choice.bound <= (_free() if limit is None else limit):
            return choice
    least = min(choice.bound for choice in found)
    if limit is None and any("fisher gradients" in needs for needs in statistics_needed(setup.rules).values()):
        raise OptionError(
            f"{len(setup.probes.ids)} gradients of each weight take {shown_bytes(least)} of memory, more than is free: "
            "take fewer --samples, leave layers out with --ignore, or use woodfisher"
        )
    if limit is None:
        return found[-1]
    raise OptionError(
        f"--memory {shown_bytes(limit)} is not enough for this model and method: {shown_bytes(least)} are, needed to "
        f"{found[-1].largest}"
    )


def waiting_bytes(setup: Setup) -> int:
    """Return the bytes on disk in addition to the result, at most: hidden states of three steps, inputs, factors."""
    width = int(setup.network.model.config.get_text_config().hidden_size) * setup.network.dtype.itemsize
    tokens = 0 if setup.statistics is not None else sum(len(ids) for ids in setup.samples.ids)
    probed = 0 if setup.statistics is not None else sum(len(ids) for ids in setup.probes.ids)
    factors = sum(sum(_backward(setup, layer).values()) for layer in setup.network.layers)
    return width * (3 * tokens + (len(setup.network.blocks) + 4) * probed) + factors


def _bound(setup: Setup, batch_size: int, paused: bool) -> MemoryBound:
    network, dense = setup.network, setup.dense
    flows = 0 if setup.statistics is not None else -(-len(setup.samples.ids) // batch_size)
    tokens = batch_size * setup.length
    phases = comparison_phases(dense, setup.length)
    if setup.statistics is None:
        probing = min(batch_size, calibration_batch(setup.length)) * setup.length
        phases |= gradient_phases(network, probing, partial(_backward_bytes, setup))
    for block in network.blocks:
        waiting = activations(network, block, tokens, network.dtype.itemsize) * (1 if paused else max(flows, 1))
        solving = max((_solving(setup, layer, tokens) for layer in block.layers), default=0)
        sides = _attention_factors(setup, block)
        if sides:
            passed = ACTIVATIONS_HELD * activations(network, block, tokens, network.dtype.itemsize)
            phases[f"take gradients through the attention of {block.name}"] = (
                network.dtype.itemsize * parameters(block) + passed + 2 * sides
            )
        phases[f"solve {block.name}"] = _stopping(network, block, waiting) + solving + sides
    bound, largest = bound_of(phases, 0 if setup.rewriting is None else setup.rewriting.working_bytes)
    return MemoryBound(bound, batch_size, paused, largest)


def bound_of(phases: Mapping[str, int], working_bytes: int = 0) -> tuple[int, str]:
    """Return the largest memory of this process, in bytes, and the phase that needs it.

    `phases` are bytes by phase, in addition to the process's present memory and `working_bytes`.
    """
    largest = max(phases, key=phases.__getitem__)
    base = psutil.Process().memory_info().rss + LATER + working_bytes
    return base + int(phases[largest] * (1 + SHARE_FREE)), largest


def evaluated_tokens(network: CheckpointNetwork, length: int) -> int:
    """Return the tokens per batch when a result is measured."""
    return min(evaluation_batch(network, length) * length, max(PROBE_TOKENS, 2 * length))


def comparison_phases(dense: CheckpointNetwork, length: int, tokens: int | None = None) -> dict[str, int]:
    """Return the bytes of comparing a result with `dense`: the embeddings, heads and logits of both, and each block.

    Samples have at most `length` tokens, and batches `tokens`; None for those of a measurement.
    """
    outside, evaluated = _outside(dense), evaluated_tokens(dense, length)
    logits = 4 * evaluated * vocabulary(dense.model) if dense.kind != "encoder" else 0
    phases = {COMPARING: 2 * 4 * outside + _stored(dense) * outside + LOGITS_HELD * logits}
    for block in dense.blocks:
        passed = activations(dense, block, evaluated if tokens is None else tokens, 4)
        phases[f"run {block.name} in float32"] = _loaded(dense, parameters(block)) + passed
    return phases


def gradient_phases(network: CheckpointNetwork, tokens: int, kept: Callable[[Block], int]) -> dict[str, int]:
    """Return the bytes of a backward pass through each block on `tokens`; `kept` are those of a block's statistics."""
    phases = {}
    for block in network.blocks:
        widest = max((layer.weight.shape[0] for layer in block.layers), default=0)
        gradients = ACTIVATIONS_HELD * activations(network, block, tokens, network.dtype.itemsize)
        held = _loaded(network, parameters(block)) + kept(block) + gradients + 4 * tokens * widest + 4 * widest**2
        phases[f"take gradients through {block.name}"] = held
    return phases


def calibration_phases(
    verb: str, network: CheckpointNetwork, waiting: int, tokens: int, workspace: Mapping[str, int]
) -> dict[str, int]:
    """Return the bytes of each block while its layers are calibrated and solved.

    `waiting` tokens wait in a block, and pass in batches of `tokens`. `workspace` is what solving a layer takes, by
    name, for the layers whose inputs are summed.
    """
    phases = {}
    for block in network.blocks:
        own = [layer for layer in block.layers if layer.name in workspace]
        solving = max((workspace[layer.name] + _collecting(layer, tokens) for layer in own), default=0)
        held = activations(network, block, waiting, network.dtype.itemsize)
        phases[f"{verb} {block.name}"] = _stopping(network, block, held) + solving
    return phases


def _stopping(network: CheckpointNetwork, block: Block, waiting: int) -> int:
    """Return the bytes of a block whose layers are solved, its result, and the activations that wait inside it."""
    return network.dtype.itemsize * parameters(block) + parameters(block) * _stored(network) + waiting


def _collecting(layer: Layer, tokens: int) -> int:
    """Return the bytes of summing the Gram of a layer's inputs over batches of `tokens`, and of that Gram."""
    columns = layer.weight.shape[1]
    return 4 * (3 * columns**2 + tokens * columns)


def parameters(block: Block) -> int:
    """Return the number of a block's parameters."""
    return sum(parameter.numel() for parameter in block.module.parameters())


def _attention_factors(setup: Setup, block: Block) -> int:
    """Return the bytes of the statistics of a pass over a block before its layers are solved."""
    needs = statistics_needed(setup.rules)
    wanted = {name for layer in block.layers for name in needs.get(layer.name, ())}
    return sum(
        statistic.bytes(layer.weight.shape, len(setup.samples.ids))
        for name in wanted
        if isinstance(statistic := STATISTICS[name], BlockStatistic)
        for layer in layers_of_attention(block)
    )


def _free() -> int:
    """Return the total bytes that this process may take, by the free memory of the system and its control group."""
    free = int(psutil.virtual_memory().available)
    for path in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        if path.exists() and (text := path.read_text().strip()).isdigit():
            free = min(free, int(text))
    return int(psutil.Process().memory_info().rss) + int(USED_OF_FREE * free)


def _solving(setup: Setup, layer: Layer, tokens: int) -> int:
    """Return the bytes that a layer takes while its statistics are collected, or while it is solved."""
    shape, rule, every = layer.weight.shape, setup.rules.get(layer.name), statistics_needed(setup.rules)
    block = next(block for block in setup.network.blocks if layer in block.layers)
    needs = frozenset(name for other in block.layers for name in every.get(other.name, ()))
    collected = collecting_bytes(shape, needs, tokens, setup.length) if setup.statistics is None else 0
    if rule is None:
        return collected
    constraint = setup.format.constraint(layer.name)
    assert constraint is not None
    solved = layer_bytes(rule, constraint, shape, needs, len(setup.probes.ids))
    if rule.kind.couples_rows:  # other layers with the same inputs keep their factors, one for each number of outputs
        others = {other.weight.shape[0] for other in block.layers if other.weight.shape[1] == shape[1]} - {shape[0]}
        solved += sum(8 * (rows**2 + shape[1] ** 2) for rows in others)
    return max(collected, solved)


def _backward_bytes(setup: Setup, block: Block) -> int:
    """Return the bytes of a block's backward statistics, with a second copy of the largest one of the weights."""
    each = [_backward(setup, layer) for layer in block.layers]
    weights = (size for sizes in each for name, size in sizes.items() if STATISTICS[name].of_weights)
    return sum(sum(sizes.values()) for sizes in each) + max(weights, default=0)


def _backward(setup: Setup, layer: Layer) -> dict[str, int]:
    """Return the bytes of a layer's backward statistics, by name."""
    if setup.statistics is not None:
        return {}
    return {
        name: statistic.bytes(layer.weight.shape, len(setup.probes.ids))
        for name in statistics_needed(setup.rules).get(layer.name, ())
        if isinstance(statistic := STATISTICS[name], BackwardStatistic)
    }


def activations(network: CheckpointNetwork, block: Block, tokens: int, itemsize: int) -> int:
    """Return an upper bound of the bytes of a block's activations for `tokens`: the layers' inputs and outputs.

    A token reaches only some of a block's experts.
    """
    experts = {layer.name for layer in block.layers if is_expert(layer.name)}
    chosen, number = 1, 1
    if experts:
        config = network.model.config.get_text_config()
        chosen = getattr(config, "num_experts_per_tok", None) or 1
        number = len({expert_number(name) for name in experts})
    total = 0.0
    for layer in block.layers:
        share = min(chosen / number, 1.0) if layer.name in experts else 1.0
        total += share * sum(layer.weight.shape)
    return int(itemsize * tokens * total)


def _loaded(network: CheckpointNetwork, elements: int) -> int:
    """Return the bytes while `elements` weights are read and converted to the network's type."""
    stored, own = _stored(network), network.dtype.itemsize
    return elements * (own if stored == own else own + stored)


def _stored(network: CheckpointNetwork) -> int:
    """Return the bytes of a weight as it is read: in the checkpoint's type, or decoded from a compressed one."""
    name = f"{network.layers[0].name}.weight"
    keys = network.tensors.keys(name)
    return network.tensors.dtype(name).itemsize if keys[0] in network.checkpoint.shard_of else 4


def _outside(network: CheckpointNetwork) -> int:
    """Return the number of parameters outside the blocks."""
    inside = {id(parameter) for block in network.blocks for parameter in block.module.parameters()}
    return sum(parameter.numel() for parameter in network.model.parameters() if id(parameter) not in inside)


def shown_bytes(size: int) -> str:
    """Return a size as text with a unit, rounded up."""
    return f"{size / 2**30:.2f}GiB" if size >= 1 << 30 else f"{-(-size // 2**20)}MiB"
