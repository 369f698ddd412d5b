"""The same function of other weights, which are easier to round: rotations, and scales taken into layers before."""

from hesse.rewriting.checkpoint import Change, RewrittenCheckpoint
from hesse.rewriting.rewriting import ROTATIONS, Rewriting, RewritingSamples
from hesse.rewriting.scales import SCALINGS, Target

__all__ = ["ROTATIONS", "SCALINGS", "Change", "Rewriting", "RewritingSamples", "RewrittenCheckpoint", "Target"]
