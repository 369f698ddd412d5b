"""Laws that a new curvature, constraint or solver inherits as tests: classes for pytest."""

from hesse.testing.constraint import ConstraintLaws
from hesse.testing.curvature import CurvatureLaws
from hesse.testing.numbers import normal, seeds
from hesse.testing.solver import SolverLaws, peak_bytes

__all__ = ["ConstraintLaws", "CurvatureLaws", "SolverLaws", "normal", "peak_bytes", "seeds"]
