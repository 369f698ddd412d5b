"""Reports as terminal tables and HTML pages."""

from hesse.reporting.compression import compression_page
from hesse.reporting.inspection import inspection_summary
from hesse.reporting.inspection_page import inspection_page
from hesse.reporting.page import check_page, write_page
from hesse.reporting.summaries import (
    compression_summary,
    cost_table,
    estimate_summary,
    evaluation_summary,
    forecast_summary,
    prune_summary,
    push_summary,
    repair_summary,
    rotation_summary,
)
from hesse.reporting.terminal import methods_table, options_table

__all__ = [
    "check_page",
    "compression_page",
    "compression_summary",
    "cost_table",
    "estimate_summary",
    "evaluation_summary",
    "forecast_summary",
    "inspection_page",
    "inspection_summary",
    "methods_table",
    "options_table",
    "prune_summary",
    "push_summary",
    "repair_summary",
    "rotation_summary",
    "write_page",
]
