"""Hesse: change the weights of a trained network with the local quadratic model of its loss.

L(w + d) - L(w) ≈ gᵀd + ½ dᵀHd, and method = curvature × constraint × solver.

Change a model, on disk or in memory:
    compress, plan, prune, prune_gradually, finetune, repair, rotate; with Options and Training

Look at a model, or run it elsewhere:
    estimate, evaluate, inspect; export, benchmark, push

One weight matrix, with plain tensors: solve(weight, curvature, constraint, solver).
    curvature: Identity, Diagonal, Gram, Kronecker; estimate_curvatures, per_sample_gradients and Objective make them
    constraint: Grid, Sparse, LowRank
    solver: Nearest, ErrorFeedback, TwoSidedFeedback

The groups of weights that can be removed together: trace_groups.

More of each kind is in `hesse.curvature` (Hessian, GaussNewton, Fisher, ...), `hesse.constraints`, `hesse.solvers`
(lanczos, conjugate_gradients, ...), `hesse.estimation`, `hesse.partitions`, `hesse.training` and `hesse.methods`;
errors are in `hesse.errors`. Names and packages are imported on first use, since torch takes seconds to import.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what NAMES says, for type checkers and editors
    from hesse.constraints import Grid as Grid
    from hesse.constraints import LowRank as LowRank
    from hesse.constraints import Sparse as Sparse
    from hesse.curvature import Diagonal as Diagonal
    from hesse.curvature import Gram as Gram
    from hesse.curvature import Identity as Identity
    from hesse.curvature import Kronecker as Kronecker
    from hesse.curvature import Objective as Objective
    from hesse.estimation import estimate_curvatures as estimate_curvatures
    from hesse.estimation import per_sample_gradients as per_sample_gradients
    from hesse.evaluation.evaluate import evaluate as evaluate
    from hesse.inspection.inspect import inspect as inspect
    from hesse.jobs.compress import compress as compress
    from hesse.jobs.estimate import estimate as estimate
    from hesse.jobs.prune import prune as prune
    from hesse.jobs.push import push as push
    from hesse.jobs.repair import repair as repair
    from hesse.jobs.rotate import rotate as rotate
    from hesse.modules.gradual import prune_gradually as prune_gradually
    from hesse.options import Options as Options
    from hesse.partitions import trace_groups as trace_groups
    from hesse.planning.plan import plan as plan
    from hesse.runtimes.benchmark import benchmark as benchmark
    from hesse.runtimes.export import export as export
    from hesse.solvers import ErrorFeedback as ErrorFeedback
    from hesse.solvers import Nearest as Nearest
    from hesse.solvers import TwoSidedFeedback as TwoSidedFeedback
    from hesse.solvers import solve as solve
    from hesse.training import Training as Training
    from hesse.training import finetune as finetune
    from hesse.version import __version__ as __version__

# Public names by the module that defines them.
NAMES = {
    "jobs.compress": "compress",
    "jobs.estimate": "estimate",
    "jobs.prune": "prune",
    "jobs.push": "push",
    "jobs.repair": "repair",
    "jobs.rotate": "rotate",
    "planning.plan": "plan",
    "evaluation.evaluate": "evaluate",
    "inspection.inspect": "inspect",
    "runtimes.benchmark": "benchmark",
    "runtimes.export": "export",
    "modules.gradual": "prune_gradually",
    "training": "Training finetune",
    "options": "Options",
    "curvature": "Diagonal Gram Identity Kronecker Objective",
    "constraints": "Grid LowRank Sparse",
    "solvers": "ErrorFeedback Nearest TwoSidedFeedback solve",
    "estimation": "estimate_curvatures per_sample_gradients",
    "partitions": "trace_groups",
    "version": "__version__",
}
HOMES = {name: f"hesse.{module}" for module, names in NAMES.items() for name in names.split()}
PACKAGES = frozenset(
    {"constraints", "curvature", "data", "errors", "estimation", "evaluation", "formats", "inspection", "methods"}
    | {"modules", "partitions", "planning", "reporting", "result", "rewriting", "runtimes", "solvers", "testing"}
    | {"training", "version"}
)

__all__ = sorted(HOMES)


def __getattr__(name: str) -> Any:
    """Import a public name, or a package, on its first use."""
    if name in HOMES:
        value = getattr(import_module(HOMES[name]), name)
    elif name in PACKAGES:
        value = import_module(f"hesse.{name}")
    else:
        raise AttributeError(f"module 'hesse' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *HOMES, *PACKAGES})
