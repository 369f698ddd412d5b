"""Estimation: collect statistics and curvatures from data that passes through a network."""

from hesse.estimation.eigen import eigen_kronecker
from hesse.estimation.estimates import Estimates, Sums, estimate_curvatures
from hesse.estimation.gradients import per_sample_gradients
from hesse.estimation.statistics_folder import Statistics
from hesse.estimation.storage import load_curvature, save_curvature
from hesse.estimation.sums import GradientBlocks, GradientSquares, GramAccumulator, OutputMoments

__all__ = [
    "Estimates",
    "GradientBlocks",
    "GradientSquares",
    "GramAccumulator",
    "OutputMoments",
    "Statistics",
    "Sums",
    "eigen_kronecker",
    "estimate_curvatures",
    "load_curvature",
    "per_sample_gradients",
    "save_curvature",
]
