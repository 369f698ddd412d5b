"""Solvers: the cheapest allowed weights, min ½ dᵀHd with w + d in S, and linear algebra from products with H."""

from hesse.solvers.activation_aware import ActivationAware
from hesse.solvers.admm import ADMM
from hesse.solvers.base import Solution, Solver, solve, solve_with
from hesse.solvers.cheaper_side import CheaperSide
from hesse.solvers.error_feedback import ErrorFeedback
from hesse.solvers.greedy_surgeon import GreedySurgeon
from hesse.solvers.incoherent import Incoherent
from hesse.solvers.learned_rounding import LearnedRounding
from hesse.solvers.linear.conjugate_gradients import LinearSolution, conjugate_gradients, linear_solve
from hesse.solvers.linear.lanczos import Eigenpairs, Spectrum, lanczos, log_determinant, spectral_density
from hesse.solvers.linear.stochastic import Estimate, hutch_plus_plus, hutchinson_diagonal, hutchinson_trace, mean_of
from hesse.solvers.nearest import Nearest
from hesse.solvers.refit_salient import RefitSalient
from hesse.solvers.repair import Alternating, Repair
from hesse.solvers.rows_and_columns import RowsAndColumns
from hesse.solvers.salient_bits import SalientBits
from hesse.solvers.stepwise_surgeon import StepwiseSurgeon, SummedSurgeon
from hesse.solvers.two_sided_feedback import TwoSidedFeedback
from hesse.solvers.vector_feedback import VectorFeedback
from hesse.solvers.whitened_svd import WhitenedSVD

__all__ = [
    "ADMM",
    "ActivationAware",
    "Alternating",
    "CheaperSide",
    "Eigenpairs",
    "ErrorFeedback",
    "Estimate",
    "GreedySurgeon",
    "Incoherent",
    "LearnedRounding",
    "LinearSolution",
    "Nearest",
    "RefitSalient",
    "Repair",
    "RowsAndColumns",
    "SalientBits",
    "Solution",
    "Solver",
    "Spectrum",
    "StepwiseSurgeon",
    "SummedSurgeon",
    "TwoSidedFeedback",
    "VectorFeedback",
    "WhitenedSVD",
    "conjugate_gradients",
    "hutch_plus_plus",
    "hutchinson_diagonal",
    "hutchinson_trace",
    "lanczos",
    "linear_solve",
    "log_determinant",
    "mean_of",
    "solve",
    "solve_with",
    "spectral_density",
]
