"""Hesse: change the weights of a trained network with the local quadratic model of its loss.

L(w + d) - L(w) ≈ gᵀd + ½ dᵀHd, and method = curvature × constraint × solver.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hesse.constraints import Grid, LowRank, Sparse
from hesse.curvature import (
    BlockDiagonal,
    BlockRankOneSum,
    Diagonal,
    EigenKronecker,
    Fisher,
    GaussNewton,
    Gram,
    Hessian,
    Identity,
    Kronecker,
    Objective,
    RankOneSum,
)
from hesse.errors import HesseError
from hesse.methods import METHODS, Options, Recipe, load_recipe
from hesse.solvers import ErrorFeedback, Nearest, Solution, TwoSidedFeedback, WhitenedSVD, solve
from hesse.training import Distillation, GradualSchedule, Training, finetune, held_zeros
from hesse.version import __version__

if TYPE_CHECKING:
    from hesse.evaluation.evaluate import evaluate
    from hesse.inspection.inspect import inspect
    from hesse.jobs.compress import compress
    from hesse.jobs.cut import cut
    from hesse.jobs.estimate import estimate
    from hesse.jobs.prune import prune
    from hesse.jobs.repair import repair
    from hesse.jobs.rotate import rotate
    from hesse.modules import ModuleReport, compress_module
    from hesse.modules.gradual import prune_gradually
    from hesse.planning.budget import plan
    from hesse.runtimes.benchmark import benchmark
    from hesse.runtimes.export import export

__all__ = [
    "METHODS",
    "BlockDiagonal",
    "BlockRankOneSum",
    "Diagonal",
    "Distillation",
    "EigenKronecker",
    "ErrorFeedback",
    "Fisher",
    "GaussNewton",
    "GradualSchedule",
    "Gram",
    "Grid",
    "HesseError",
    "Hessian",
    "Identity",
    "Kronecker",
    "LowRank",
    "ModuleReport",
    "Nearest",
    "Objective",
    "Options",
    "RankOneSum",
    "Recipe",
    "Solution",
    "Sparse",
    "Training",
    "TwoSidedFeedback",
    "WhitenedSVD",
    "__version__",
    "benchmark",
    "compress",
    "compress_module",
    "cut",
    "estimate",
    "evaluate",
    "export",
    "finetune",
    "held_zeros",
    "inspect",
    "load_recipe",
    "plan",
    "prune",
    "prune_gradually",
    "repair",
    "rotate",
    "solve",
]


LAZY = {
    "ModuleReport": "modules.report",
    "benchmark": "runtimes.benchmark",
    "compress": "jobs.compress",
    "compress_module": "modules.compress",
    "cut": "jobs.cut",
    "estimate": "jobs.estimate",
    "evaluate": "evaluation.evaluate",
    "export": "runtimes.export",
    "inspect": "inspection.inspect",
    "plan": "planning.budget",
    "prune": "jobs.prune",
    "prune_gradually": "modules.gradual",
    "repair": "jobs.repair",
    "rotate": "jobs.rotate",
}


def __getattr__(name: str) -> Any:
    """Import what needs transformers on first use: it takes seconds that tensors do not need."""
    if name in LAZY:
        return getattr(import_module(f"hesse.{LAZY[name]}"), name)
    raise AttributeError(f"module 'hesse' has no attribute {name!r}")
