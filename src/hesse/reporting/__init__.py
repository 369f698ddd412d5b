"""What a person reads."""

from hesse.reporting.inspection import inspection_summary
from hesse.reporting.terminal import compression_summary, cost_table, evaluation_table, methods_table

__all__ = ["compression_summary", "cost_table", "evaluation_table", "inspection_summary", "methods_table"]
