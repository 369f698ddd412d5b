"""S: the weights that are allowed, and how they are stored. Plain tensors in, plain tensors out."""

from hesse.constraints.base import Constraint
from hesse.constraints.grid import Grid, GridCode, Scales
from hesse.constraints.low_rank import LowRank, LowRankCode
from hesse.constraints.sparse import Sparse, SparseCode, SparseGrid

__all__ = ["Constraint", "Grid", "GridCode", "LowRank", "LowRankCode", "Scales", "Sparse", "SparseCode", "SparseGrid"]
