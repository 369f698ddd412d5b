"""Read a written checkpoint back as a loader would, and compare it with what was solved and predicted."""

import torch

from hesse.errors import VerificationError
from hesse.evaluation.evaluate import Evaluation, compare
from hesse.layerwise.solved_layer import digest
from hesse.networks.network import CheckpointNetwork, each_loaded
from hesse.passes.stream import StreamBatch, advance, start
from hesse.progress import Progress
from hesse.result import LossChange

# A quadratic model may be wrong by a factor of a few, and small increases drown in what it leaves out. Beyond these
# the file is more likely to be broken than the prediction: refused.
TOLERATED_RATIO = 20.0
TOLERATED_INCREASE = 0.05  # nats per token


def verify(
    written: CheckpointNetwork,
    dense_network: CheckpointNetwork,
    dense: list[StreamBatch],
    digests: dict[str, str],
    predicted_by_layer: dict[str, float],
    held_out: bool,
    progress: Progress,
) -> LossChange:
    """Read `written` back, compare every solved weight, and measure what the change did to the check samples.

    Raises:
        VerificationError: a weight differs from what was solved, or the measured loss increase is out of all
            proportion to the prediction; the message names the layer.
    """
    result = read_back(written, dense_network, dense, digests, progress)
    predicted = sum(predicted_by_layer.values())
    limit = TOLERATED_RATIO * predicted + TOLERATED_INCREASE * _scale(result.hidden_error, dense)
    if not result.difference <= limit:
        worst = max(predicted_by_layer, key=predicted_by_layer.__getitem__, default="no layer")
        raise VerificationError(
            f"the written model differs from the dense one by {result.difference:.4g} nats per token, against "
            f"{predicted:.4g} predicted: nothing was put in place; most of the prediction lies in {worst}: leave it "
            "out with --ignore, or give it more bits"
        )
    return result.loss_change("compressed", held_out, predicted)


def read_back(
    written: CheckpointNetwork,
    dense_network: CheckpointNetwork,
    dense: list[StreamBatch],
    digests: dict[str, str],
    progress: Progress,
) -> Evaluation:
    """Take the check samples through `written`, and compare what it predicts with the dense model's flows.

    Raises:
        VerificationError: a weight differs from what was solved, by its fingerprint in `digests`.
    """
    progress.begin("verify", len(written.blocks))
    flows = start(written, [flow.given for flow in dense])
    for index, block in each_loaded(written):
        for layer in block.layers:
            if layer.name in digests and digest(layer.weight) != digests[layer.name]:
                raise VerificationError(
                    f"{layer.name} reads back different from what was solved: nothing was put in place; check the "
                    "disk, and report it if it happens again"
                )
        advance(flows, block.module, index)
        progress.advance()
    return compare(written, flows, dense_network, dense, progress)


def _scale(hidden_error: float | None, dense: list[StreamBatch]) -> float:
    """Return one nat in the unit of the loss: 1 for a language model, an encoder's mean squared hidden state."""
    if hidden_error is None:
        return 1.0
    squares = [flow.hidden.double().square().sum(-1).mean() for flow in dense]
    return float(torch.stack(squares).mean())
