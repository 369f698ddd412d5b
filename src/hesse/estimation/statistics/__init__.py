"""Statistics: what data tells about a layer. Each is an object, one a file, in the table STATISTICS."""

from hesse.estimation.statistics.attention_factor import AttentionFactor
from hesse.estimation.statistics.base import BlockStatistic, InputStatistic, Statistic
from hesse.estimation.statistics.inputs import InputPeaks, Inputs
from hesse.estimation.statistics.weighted_inputs import WeightedInputs

STATISTICS: dict[str, Statistic] = {
    statistic.name: statistic for statistic in (Inputs(), InputPeaks(), WeightedInputs(), AttentionFactor())
}

__all__ = ["STATISTICS", "BlockStatistic", "InputStatistic", "Statistic"]
