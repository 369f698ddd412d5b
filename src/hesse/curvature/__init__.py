"""H: what it is and its products. Plain tensors in, plain tensors out."""

from hesse.curvature.base import Curvature
from hesse.curvature.block_rank_one_sum import BlockAccumulator, BlockRankOneSum
from hesse.curvature.composite import BlockDiagonal, Scaled, Sum
from hesse.curvature.diagonal import Diagonal, Identity
from hesse.curvature.exact import Fisher, GaussNewton, Hessian
from hesse.curvature.gram import Gram
from hesse.curvature.kronecker import EigenKronecker, Kronecker
from hesse.curvature.losses import CrossEntropy, Loss, SquaredError, UserLoss
from hesse.curvature.objective import Objective
from hesse.curvature.origin import Origin
from hesse.curvature.rank_one_sum import GradientWindow, RankOneSum

__all__ = [
    "BlockAccumulator",
    "BlockDiagonal",
    "BlockRankOneSum",
    "CrossEntropy",
    "Curvature",
    "Diagonal",
    "EigenKronecker",
    "Fisher",
    "GaussNewton",
    "GradientWindow",
    "Gram",
    "Hessian",
    "Identity",
    "Kronecker",
    "Loss",
    "Objective",
    "Origin",
    "RankOneSum",
    "Scaled",
    "SquaredError",
    "Sum",
    "UserLoss",
]
