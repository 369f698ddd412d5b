"""The dense model's own pass: what its layers' outputs mean to the loss, and what it predicts on the check samples."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hesse.estimation import output_sensitivities
from hesse.models.network import Network
from hesse.models.stream import Flow, advance, check_finite, start
from hesse.progress import Clock


@dataclass(frozen=True, eq=False)
class DensePass:
    """Sensitivities by layer (out,) in nats per token, and the check samples' flows after the last block."""

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
    moving = flows if probes is flows else [*flows, *probes]
    inputs = []
    for index, block in enumerate(network.blocks):
        inputs.append([flow.hidden for flow in probes])
        with clock.phase("read"), network.loaded(block) as module, clock.phase("probe"):
            advance(moving, module, index)
            check_finite(moving, block.name)
        step()
    if not probes:
        return DensePass({}, flows)
    with clock.phase("probe"):
        ended = [replace(flow) for flow in probes]  # the walk back moves them
        sensitivities = output_sensitivities(network, ended, inputs, seed, step)
    return DensePass({name: value.to(torch.float32) for name, value in sensitivities.items()}, flows)
