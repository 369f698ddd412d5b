"""The cheapest allowed weights: min ½ dᵀHd with w + d in S."""

from hesse.solvers.base import Solution, Solver, solve, solve_with
from hesse.solvers.error_feedback import ErrorFeedback
from hesse.solvers.nearest import Nearest
from hesse.solvers.whitened_svd import WhitenedSVD

__all__ = ["ErrorFeedback", "Nearest", "Solution", "Solver", "WhitenedSVD", "solve", "solve_with"]
