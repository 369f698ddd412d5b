"""The dense model's own pass: what its layers' outputs mean to the loss, and what it predicts on the check samples."""

from collections.abc import Callable
from dataclasses import dataclass

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
    sensitivity: list[Tensor],
    seed: int,
    clock: Clock,
    step: Callable[[], None],
) -> DensePass:
    """Take the batches `check` and `sensitivity` (samples, tokens) through the unchanged model; `step` after blocks."""
    with clock.phase("probe"):
        flows = start(network, check)
        probes = start(network, sensitivity)
    inputs = []
    for index, block in enumerate(network.blocks):
        inputs.append([flow.hidden for flow in probes])
        with clock.phase("read"), network.loaded(block) as module, clock.phase("probe"):
            advance([*flows, *probes], module, index)
            check_finite([*flows, *probes], block.name)
        step()
    with clock.phase("probe"):
        sensitivities = output_sensitivities(network, probes, inputs, seed, step)
    return DensePass({name: value.to(torch.float32) for name, value in sensitivities.items()}, flows)
