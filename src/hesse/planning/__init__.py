"""Planning: divide one budget of bytes or of loss among the layers of a network."""

from hesse.planning.bisection import smallest_accepted
from hesse.planning.block_sparsity import TilePlan, plan_tiles
from hesse.planning.front import FrontPoint, size_loss_front
from hesse.planning.pricing import Member, Pricing, allocate, grid_menu, price, use
from hesse.planning.problem import Candidate, Choice, ChoiceGroup, Problem
from hesse.planning.slope import by_common_slope
from hesse.planning.solve import cheapest_within, smallest_within

__all__ = [
    "Candidate",
    "Choice",
    "ChoiceGroup",
    "FrontPoint",
    "Member",
    "Pricing",
    "Problem",
    "TilePlan",
    "allocate",
    "by_common_slope",
    "cheapest_within",
    "grid_menu",
    "plan_tiles",
    "price",
    "size_loss_front",
    "smallest_accepted",
    "smallest_within",
    "use",
]
