"""From data to curvature: what flows through a network fills these."""

from hesse.estimation.backward import BackwardWalk, WalkState, layer_part
from hesse.estimation.curvatures import estimate_curvatures
from hesse.estimation.eigen import eigen_kronecker
from hesse.estimation.estimates import Estimates, Sums
from hesse.estimation.gradients import per_sample_gradients
from hesse.estimation.gram import GramAccumulator
from hesse.estimation.parts import seen_by
from hesse.estimation.passage import Passage
from hesse.estimation.statistics import Statistics
from hesse.estimation.storage import load_curvature, save_curvature
from hesse.estimation.sums import GradientBlocks, GradientSquares, OutputMoments
from hesse.estimation.walk import Walk

__all__ = [
    "BackwardWalk",
    "Estimates",
    "GradientBlocks",
    "GradientSquares",
    "GramAccumulator",
    "OutputMoments",
    "Passage",
    "Statistics",
    "Sums",
    "Walk",
    "WalkState",
    "eigen_kronecker",
    "estimate_curvatures",
    "layer_part",
    "load_curvature",
    "per_sample_gradients",
    "save_curvature",
    "seen_by",
]
