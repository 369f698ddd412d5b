"""The dense model's own pass: what its layers' outputs mean to the loss, and what it predicts on the check samples."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from hesse.compression.factors import StoredFactors
from hesse.data import Samples
from hesse.estimation import BackwardWalk, OutputMoments, layer_part
from hesse.evaluation.evaluate import evaluation_batch, vocabulary
from hesse.models.network import Network
from hesse.models.stream import Flow, advance, calibration_batch, check_finite, start
from hesse.progress import Clock


@dataclass(frozen=True, eq=False)
class DensePass:
    """What the loss feels of each layer's outputs, and the check samples' flows after the last block.

    `sensitivities` are E[ggᵀ] (out, out) at the outputs of layers whose whole factor was asked for, and E[g²] (out,) of
    the others, in nats per token.
    """

    sensitivities: Mapping[str, Tensor]
    flows: list[Flow]


def check_pass(network: Network, check: list[Tensor], clock: Clock, step: Callable[[], None]) -> list[Flow]:
    """The batches `check` (samples, tokens) after all blocks of the unchanged model; `step` after each block."""
    with clock.phase("probe"):
        flows = start(network, check)
    forward_walk(network, flows, [], clock, step)
    return flows


def probe(
    network: Network,
    samples: Samples,
    whole: Collection[str],
    folder: Path,
    seed: int,
    clock: Clock,
    step: Callable[[], None],
) -> StoredFactors:
    """E[ggᵀ] (out, out) at the outputs of the layers `whole`, E[g²] (out,) at those of others; `step` after each block.

    The samples go through the unchanged model and back; what is found is kept below `folder`.
    """
    length = max(len(ids) for ids in samples.ids)
    size = min(evaluation_batch(vocabulary(network), length), calibration_batch(length))
    with clock.phase("probe"):
        flows = start(network, samples.batches(size))
    inputs = forward_walk(network, flows, flows, clock, step)
    found = StoredFactors(folder)
    with clock.phase("probe"):
        walk = BackwardWalk(network, flows, inputs, seed)
        step()
        for factors in output_factors(walk, whole):
            for name, factor in factors.items():
                found.keep(name, factor)
            step()
    return found


def forward_walk(
    network: Network, flows: list[Flow], kept: list[Flow], clock: Clock, step: Callable[[], None]
) -> list[list[Tensor]]:
    """Take `flows` through all blocks; what reached each block of those in `kept`."""
    inputs = []
    for index, block in enumerate(network.blocks):
        inputs.append([flow.hidden for flow in kept])
        with clock.phase("read"), network.loaded(block) as module, clock.phase("probe"):
            advance(flows, module, index)
            check_finite(flows, block.name)
        step()
    return inputs


def output_factors(walk: BackwardWalk, whole: Collection[str]) -> Iterator[dict[str, Tensor]]:
    """Of each block: what the loss feels of its layers' outputs, in nats per token, their factor of a Kronecker.

    Per position. It is E[ggᵀ] (out, out) for the layers `whole`, its diagonal E[g²] (out,) for others. With the Gram of
    the layer's inputs it gives the loss increase of a change d as ½ tr(E[ggᵀ] d E[xxᵀ] dᵀ).
    """
    for block, passages in walk:
        kinds = [
            OutputMoments([layer_part(layer) for layer in layers], "position", diagonal)
            for diagonal in (False, True)
            if (layers := [layer for layer in block.layers if (layer.name in whole) != diagonal])
        ]
        for passage in passages:
            for sums in kinds:
                sums.add(passage)
        yield {
            modules[0]: moment.times(walk.scale, f"gradients at the outputs of {modules[0]}")
            for sums in kinds
            for modules, moment in sums.sums.items()
            if moment.count
        }
