"""Laws that a new curvature, constraint, partition or solver inherits as tests: classes for pytest."""

from hesse.testing.constraint import ConstraintLaws
from hesse.testing.curvature import CurvatureLaws
from hesse.testing.numbers import normal, seeds
from hesse.testing.partition import PartitionLaws
from hesse.testing.solver import SolverLaws, peak_bytes

__all__ = ["ConstraintLaws", "CurvatureLaws", "PartitionLaws", "SolverLaws", "normal", "peak_bytes", "seeds"]
