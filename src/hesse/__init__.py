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
    from hesse.api import (
        benchmark,
        compress,
        cut,
        drop_blocks,
        estimate,
        evaluate,
        export,
        inspect,
        narrow,
        plan,
        repair,
        rotate,
    )
    from hesse.modules import ModuleReport, compress_module
    from hesse.modules.gradual import prune_gradually
    from hesse.modules.prune import prune

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
    "drop_blocks",
    "estimate",
    "evaluate",
    "export",
    "finetune",
    "held_zeros",
    "inspect",
    "load_recipe",
    "narrow",
    "plan",
    "prune",
    "prune_gradually",
    "repair",
    "rotate",
    "solve",
]


MODULES = {
    "ModuleReport": "report",
    "compress_module": "compress",
    "prune_gradually": "gradual",
    "prune": "prune",
}


def __getattr__(name: str) -> Any:
    """Import what needs transformers on first use: it takes seconds that tensors do not need."""
    if name in MODULES:
        return getattr(import_module(f"hesse.modules.{MODULES[name]}"), name)
    if name in __all__:
        return getattr(import_module("hesse.api"), name)
    raise AttributeError(f"module 'hesse' has no attribute {name!r}")
