"""What became of a model's blocks: the content of `--json`, and of the report file beside the weights."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class DroppedBlock:
    """A block that was taken out; losses in nats per token on the samples that blocks were judged by."""

    block: int  # its number in the dense model
    score: float  # what it was judged by, in the unit of the importance
    measured: float  # of the model without it and all that went before
    donor: int | None = None  # the block that stands in for it
    relative_error: float | None = None  # ‖W_k - (s ⊙ W_j + LR)‖² / ‖W_k‖² of its layers, in the metric of their inputs


@dataclass(frozen=True)
class DropReport:
    """The whole run. Sizes in bytes, losses in nats per token, half squared errors of hidden states for an encoder."""

    model: str
    out: str
    importance: str
    share_rank: int | None
    scores: list[float]  # of all blocks of the dense model, in the unit of the importance
    dropped: list[DroppedBlock]  # in the order in which they went
    kept: list[int]
    parameters_before: int
    parameters_after: int  # that have to be stored: of a block with a stand-in its factors, scales, norms and biases
    bytes_before: int
    bytes_after: int  # on disk, where blocks with stand-ins are written out
    loss_name: str
    measured: float  # on samples that blocks were not judged by, where there are any
    standard_error: float | None
    samples: int
    held_out: bool
    notes: list[str]
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)
