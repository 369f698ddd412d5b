"""Rewriting: change weights so that they round better without changing the function, by rotations or scales."""

from hesse.rewriting.checkpoint import RewrittenCheckpoint, StreamChange
from hesse.rewriting.rewriting import ROTATIONS, Rewriting, RewritingSamples
from hesse.rewriting.scales import SCALINGS, RoundingTarget

__all__ = [
    "ROTATIONS",
    "SCALINGS",
    "Rewriting",
    "RewritingSamples",
    "RewrittenCheckpoint",
    "RoundingTarget",
    "StreamChange",
]
