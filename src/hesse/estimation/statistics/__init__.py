"""Statistics of a layer that are collected from data. Each is an object in the table STATISTICS."""

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
