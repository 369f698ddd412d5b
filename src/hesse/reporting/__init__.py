"""Reports as terminal tables and HTML pages."""

from hesse.reporting.blocks import blocks_summary, narrow_summary
from hesse.reporting.compression import compression_page
from hesse.reporting.forecast import forecast_summary
from hesse.reporting.inspection import inspection_summary
from hesse.reporting.inspection_page import inspection_page
from hesse.reporting.page import check_page, write_page
from hesse.reporting.repair import repair_summary
from hesse.reporting.terminal import compression_summary, cost_table, evaluation_table, methods_table, options_table

__all__ = [
    "blocks_summary",
    "check_page",
    "compression_page",
    "compression_summary",
    "cost_table",
    "evaluation_table",
    "forecast_summary",
    "inspection_page",
    "inspection_summary",
    "methods_table",
    "narrow_summary",
    "options_table",
    "repair_summary",
    "write_page",
]
