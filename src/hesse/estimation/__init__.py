"""From data to curvature: what flows through a network fills these."""

from hesse.estimation.gradients import (
    fisher_blocks,
    fisher_diagonal,
    fisher_rank_one_sum,
    per_sample_gradients,
)
from hesse.estimation.gram import GramAccumulator
from hesse.estimation.kronecker import LayerFactors, eigen_kronecker, kronecker_factors
from hesse.estimation.sensitivity import output_sensitivities
from hesse.estimation.storage import load_curvature, save_curvature

__all__ = [
    "GramAccumulator",
    "LayerFactors",
    "eigen_kronecker",
    "fisher_blocks",
    "fisher_diagonal",
    "fisher_rank_one_sum",
    "kronecker_factors",
    "load_curvature",
    "output_sensitivities",
    "per_sample_gradients",
    "save_curvature",
]
