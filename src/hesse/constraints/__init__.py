"""S: the weights that are allowed, and how they are stored. Plain tensors in, plain tensors out."""

from hesse.constraints.base import Constraint
from hesse.constraints.block_table import BlockTable
from hesse.constraints.codebook import Codebook, CodebookCode
from hesse.constraints.either_side import AlongOutputs, EitherSide, SideCode
from hesse.constraints.grid import Grid
from hesse.constraints.grouped import GridCode, Grouped, Scales
from hesse.constraints.low_rank import LowRank, LowRankCode
from hesse.constraints.microscaled import Microscaled
from hesse.constraints.mixed_grid import GroupBits, MixedCode, MixedGrid
from hesse.constraints.plus import Plus, PlusCode
from hesse.constraints.rotated import Rotated
from hesse.constraints.salient_columns import SalientCode, SalientColumns
from hesse.constraints.scaled_columns import ScaledCode, ScaledColumns
from hesse.constraints.sign_rank_one import SignRankOne, SignRankOneCode
from hesse.constraints.sparse import Sparse, SparseCode, SparseGrid
from hesse.constraints.table import Table
from hesse.constraints.vector_codebook import VectorCode, VectorCodebook

__all__ = [
    "AlongOutputs",
    "BlockTable",
    "Codebook",
    "CodebookCode",
    "Constraint",
    "EitherSide",
    "Grid",
    "GridCode",
    "GroupBits",
    "Grouped",
    "LowRank",
    "LowRankCode",
    "Microscaled",
    "MixedCode",
    "MixedGrid",
    "Plus",
    "PlusCode",
    "Rotated",
    "SalientCode",
    "SalientColumns",
    "ScaledCode",
    "ScaledColumns",
    "Scales",
    "SideCode",
    "SignRankOne",
    "SignRankOneCode",
    "Sparse",
    "SparseCode",
    "SparseGrid",
    "Table",
    "VectorCode",
    "VectorCodebook",
]
