"""The report of blocks that were removed."""

from dataclasses import dataclass

from hesse.result import Report


@dataclass(frozen=True)
class RemovedBlock:
    """A removed block; losses in nats per token on the samples that blocks were judged by."""

    block: int  # its number in the dense model
    score: float  # by which it was chosen, in the unit of the score
    measured: float  # loss of the model without it and all blocks that were removed before
    donor: int | None = None  # the block whose weights it shares
    relative_error: float | None = None  # ‖W_k - (s ⊙ W_j + LR)‖² / ‖W_k‖² of its layers, in the metric of their inputs


@dataclass(frozen=True, kw_only=True)
class BlocksReport(Report):
    """The removed blocks, which the `score` chose.

    `parameters_after` have to be stored: of a block that shares weights its factors, scales, norms and biases. The
    files, of `bytes_after`, hold such blocks written out.
    """

    what: str = "blocks"
    score: str
    rank: int | None  # beside each layer of blocks that share weights
    scores: list[float]  # of all blocks of the dense model, in the unit of the score
    removed: list[RemovedBlock]  # in the order of removal
    kept: list[int]
