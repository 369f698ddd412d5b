"""From data to curvature: what flows through a network fills these."""

from hesse.estimation.gram import GramAccumulator
from hesse.estimation.sensitivity import output_sensitivities

__all__ = ["GramAccumulator", "output_sensitivities"]
