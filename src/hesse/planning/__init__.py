"""Sharing one budget of bytes, or of loss, among the layers of a network."""

from hesse.planning.front import FrontPoint, size_loss_front
from hesse.planning.problem import Candidate, Choice, Group, Problem
from hesse.planning.solve import cheapest_within, smallest_within

__all__ = [
    "Candidate",
    "Choice",
    "FrontPoint",
    "Group",
    "Problem",
    "cheapest_within",
    "size_loss_front",
    "smallest_within",
]
