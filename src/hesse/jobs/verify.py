"""Read a written checkpoint back as a loader would, and compare it with what was solved and predicted."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hesse.checkpoints.checkpoint import Checkpoint
from hesse.errors import VerificationError
from hesse.evaluation.evaluate import Evaluation, compare
from hesse.formats import open_checkpoint
from hesse.layerwise.solved_layer import digest
from hesse.networks.network import CheckpointNetwork, each_loaded
from hesse.passes.stream import StreamBatch, advance, start
from hesse.progress import Progress
from hesse.result import LossChange

# A quadratic model may be wrong by a factor of a few, and small increases drown in what it leaves out. Beyond these
# the file is more likely to be broken than the prediction: refused.
TOLERATED_RATIO = 20.0
TOLERATED_INCREASE = 0.05  # nats per token


@dataclass(frozen=True)
class Verification:
    """Result of reading a checkpoint back; losses as in LossChange."""

    tensors_equal: int
    samples: int
    held_out: bool  # True if calibration never saw these samples
    loss_name: str
    measured: float
    standard_error: float | None
    predicted: float

    def loss_change(self) -> LossChange:
        """Return the losses as reports hold them."""
        return LossChange(
            name=self.loss_name,
            predicted=self.predicted,
            measured=self.measured,
            standard_error=self.standard_error,
            samples=self.samples,
            held_out=self.held_out,
        )


def verify(
    folder: Path,
    source: Checkpoint,
    dense_network: CheckpointNetwork,
    dense: list[StreamBatch],
    digests: dict[str, str],
    predicted_by_layer: dict[str, float],
    held_out: bool,
    progress: Progress,
) -> Verification:
    """Read `folder` back, compare every weight, and measure what the change did to the check samples.

    Raises:
        VerificationError: a weight differs from what was solved or copied, or the measured loss increase is out of all
            proportion to the prediction; the message names the layer.
    """
    written = open_checkpoint(folder)
    same = _compare_copied(source, written, digests)
    result = read_back(written, dense_network, dense, digests, progress)
    measured = result.difference
    predicted = sum(predicted_by_layer.values())
    limit = TOLERATED_RATIO * predicted + TOLERATED_INCREASE * _scale(result.hidden_error, dense)
    if not measured <= limit:
        worst = max(predicted_by_layer, key=predicted_by_layer.__getitem__, default="no layer")
        raise VerificationError(
            f"the written model differs from the dense one by {measured:.4g} nats per token, against {predicted:.4g} "
            f"predicted: nothing was put in place; most of the prediction lies in {worst}: leave it out with --ignore, "
            "or give it more bits"
        )
    return Verification(
        tensors_equal=same + len(digests),
        samples=result.samples,
        held_out=held_out,
        loss_name=result.difference_name("compressed"),
        measured=measured,
        standard_error=result.kl_standard_error,
        predicted=predicted,
    )


def read_back(
    written: Checkpoint,
    dense_network: CheckpointNetwork,
    dense: list[StreamBatch],
    digests: dict[str, str],
    progress: Progress,
) -> Evaluation:
    """Take the check samples through `written`, and compare what it predicts with the dense model's flows.

    Raises:
        VerificationError: a weight differs from what was solved, by its fingerprint in `digests`.
    """
    network = CheckpointNetwork(written, torch.float32, dense_network.device)
    progress.begin("verify", len(network.blocks))
    flows = start(network, [flow.ids for flow in dense])
    for index, block in each_loaded(network):
        for layer in block.layers:
            if layer.name in digests and digest(layer.weight) != digests[layer.name]:
                raise VerificationError(
                    f"{layer.name} reads back different from what was solved: nothing was put in place; check the "
                    "disk, and report it if it happens again"
                )
        advance(flows, block.module, index)
        progress.advance()
    return compare(network, flows, dense_network, dense, progress)


def _compare_copied(source: Checkpoint, written: Checkpoint, digests: dict[str, str]) -> int:
    """Compare each tensor that was to be left alone; how many there were."""
    count = 0
    for name in source.stored_names():
        if name.removesuffix(".weight") in digests:
            continue
        before = source.read([name])[name]
        after: Tensor = written.read([name])[name]
        if before.dtype != after.dtype or not torch.equal(_bits(before), _bits(after)):
            raise VerificationError(f"{name} was to be copied but reads back different: nothing was put in place")
        count += 1
    return count


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.ndim else tensor


def _scale(hidden_error: float | None, dense: list[StreamBatch]) -> float:
    """What one nat is for this kind of loss: 1 for a language model, the mean squared hidden state for an encoder."""
    if hidden_error is None:
        return 1.0
    squares = [flow.hidden.double().square().sum(-1).mean() for flow in dense]
    return float(torch.stack(squares).mean())
