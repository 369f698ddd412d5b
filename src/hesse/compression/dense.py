"""The dense model's own pass: what its layers' outputs mean to the loss, and what it predicts on the check samples."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from hesse.estimation import BackwardWalk, OutputMoments, layer_part
from hesse.models.network import Network
from hesse.models.stream import Flow, advance, check_finite, start
from hesse.progress import Clock


@dataclass(frozen=True, eq=False)
class DensePass:
    """E[g²] at each layer's outputs (out,) in nats per token, and the check samples' flows after the last block."""

    sensitivities: dict[str, Tensor]
    flows: list[Flow]


def dense_pass(
    network: Network,
    check: list[Tensor],
    sensitivity: list[Tensor] | None,
    seed: int,
    clock: Clock,
    step: Callable[[], None],
) -> DensePass:
    """Take the batches `check` and `sensitivity` (samples, tokens) through the unchanged model; `step` after blocks.

    Where both are one list, its flows are taken through once. Without `sensitivity` there are no sensitivities.
    """
    with clock.phase("probe"):
        flows = start(network, check)
        probes = [] if sensitivity is None else flows if sensitivity is check else start(network, sensitivity)
    inputs = forward_walk(network, flows if probes is flows else [*flows, *probes], probes, clock, step)
    if not probes:
        return DensePass({}, flows)
    with clock.phase("probe"):
        ended = [replace(flow) for flow in probes]  # the walk back moves them
        return DensePass(output_sensitivities(BackwardWalk(network, ended, inputs, seed), step), flows)


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


def output_sensitivities(walk: BackwardWalk, step: Callable[[], None]) -> dict[str, Tensor]:
    """E[g²] of each layer's outputs (out,), in nats per token: the diagonal of its Kronecker factor, per position.

    With the Gram of the layer's inputs it gives the loss increase of a change d as ½ Σ_i E[g_i²] d_i E[xxᵀ] d_iᵀ.
    """
    step()
    found: dict[str, Tensor] = {}
    for block, passages in walk:
        sums = OutputMoments([layer_part(layer) for layer in block.layers], "position", diagonal=True)
        for passage in passages:
            sums.add(passage)
        found.update({modules[0]: m.total * walk.scale for modules, m in sums.sums.items() if m.count})
        step()
    return found
