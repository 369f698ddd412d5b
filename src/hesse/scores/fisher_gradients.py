"""M-FAC over all layers jointly: the inverse Fisher of whole networks, from single samples' gradients."""

from torch import Tensor

from hesse.curvature import RankOneSum
from hesse.errors import OptionError
from hesse.partitions import Partition
from hesse.scores.evidence import LossEvidence
from hesse.scores.score import WEIGHTS, Score, add_score


class MatrixFreeSurgeon(Score):
    """w² / 2[F⁻¹]_ii with F = λI + 1/m Σ g gᵀ over all weights jointly: the cost with the best values of all others."""

    def cost(self, evidence: LossEvidence, partition: Partition) -> Tensor:
        if tuple(partition.shapes) != evidence.objective.names:
            raise OptionError(f"{self.name} judges all parameters of the objective at once, not some of them")
        weights = partition.sums(evidence.weights(partition))
        return weights.square() / (2 * evidence.fisher_gradients.inverse_diagonal())

    def curvature(self, evidence: LossEvidence) -> RankOneSum:
        return evidence.fisher_gradients


add_score(
    MatrixFreeSurgeon(
        name="m-fac-network",
        source="M-FAC, Frantar, Kurtic and Alistarh, 2021, arXiv:2107.03356, over all layers at once",
        parts=WEIGHTS,
        uses="fisher_gradients",
        nats=True,
    )
)
