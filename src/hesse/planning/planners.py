"""Planners: how a choice for every group of a problem is made, by the name that a method gives as its solver."""

from collections.abc import Callable
from typing import Any

from hesse.planning.bisection import smallest_accepted
from hesse.planning.problem import Choice, Problem
from hesse.planning.slope import by_common_slope
from hesse.planning.solve import cheapest_within
from hesse.registry import Registry

# Each takes a problem and its limit: bytes, or for the bisection a function that accepts a choice or not.
PLANNERS: Registry[Callable[[Problem, Any], Choice]] = Registry("planner")
PLANNERS.register("knapsack", cheapest_within)
PLANNERS.register("common_slope", by_common_slope)
PLANNERS.register("bisection", smallest_accepted)
