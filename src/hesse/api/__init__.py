"""`hesse.compress`, `hesse.evaluate` and the others: what the command line does, from Python."""

from hesse.api.blocks import narrow
from hesse.api.compression import estimate, plan
from hesse.api.cutting import cut
from hesse.api.measurement import evaluate, inspect
from hesse.api.repairing import repair
from hesse.api.runtimes import benchmark, export

__all__ = [
    "benchmark",
    "cut",
    "estimate",
    "evaluate",
    "export",
    "inspect",
    "narrow",
    "plan",
    "repair",
]
