"""Structured pruning: heads, neurons, channels and experts that cost the loss least are cut out."""

from hesse.structured.half_space import HalfSpace, only_train_once
from hesse.structured.implant import Implant, ImplantedLayer
from hesse.structured.narrow_heads import narrow_heads
from hesse.structured.prune import prune_groups
from hesse.structured.report import StructuredReport

__all__ = [
    "HalfSpace",
    "Implant",
    "ImplantedLayer",
    "StructuredReport",
    "narrow_heads",
    "only_train_once",
    "prune_groups",
]
