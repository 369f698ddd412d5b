"""Workspace in bytes of solving one layer, as its statistics, solver and constraint declare it."""

from collections.abc import Collection

import torch

from hesse.constraints import Constraint
from hesse.estimation.statistics import STATISTICS, InputStatistic
from hesse.layerwise.layer_solver import small_problem
from hesse.methods.recipe import Rule

WEIGHTS = 7  # matrices of the weight's size while a solution is priced: it, the weight, the change, and its images


def layer_bytes(rule: Rule, constraint: Constraint, shape: torch.Size, needs: Collection[str], samples: int) -> int:
    """Return the bytes that solving and pricing a layer of `shape` (out, in) holds at most, its statistics included.

    `needs` are the statistics that are in memory for it, `samples` those that statistics of single samples are of.
    """
    rows, columns = shape
    kept = {name: STATISTICS[name].bytes(shape, samples) for name in {*needs, *rule.kind.needs}}
    own = sum(kept[name] for name in rule.kind.needs)  # which the curvature may copy when it is damped
    solver = rule.solver.build()
    curvature = type(rule.kind.build(small_problem(rule, constraint), rule.solver, 0.01))
    working = solver.workspace(shape, curvature, constraint, own // 4)
    weight = 4 * rows * columns
    return sum(kept.values()) + own + weight + max(working, WEIGHTS * weight)


def collecting_bytes(shape: torch.Size, needs: Collection[str], tokens: int, length: int) -> int:
    """Return the bytes of collecting the statistics `needs` at a layer from batches of `tokens` tokens."""
    statistics = [statistic for name in needs if isinstance(statistic := STATISTICS[name], InputStatistic)]
    working = sum(statistic.working_bytes(shape, tokens, length) for statistic in statistics)
    return working + 3 * sum(statistic.bytes(shape, 1) for statistic in statistics)  # sums, and what is made of them
