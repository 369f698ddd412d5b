"""Statistics: what data tells about a layer. Each is an object in the table STATISTICS, whose file defines it."""

from hesse.estimation.statistics.base import (
    STATISTICS,
    BackwardCollection,
    BackwardStatistic,
    BlockStatistic,
    InputStatistic,
    Needs,
    Statistic,
    by_statistic,
    needs_samples,
    probe_tokens,
)

__all__ = [
    "STATISTICS",
    "BackwardCollection",
    "BackwardStatistic",
    "BlockStatistic",
    "InputStatistic",
    "Needs",
    "Statistic",
    "by_statistic",
    "needs_samples",
    "probe_tokens",
]
