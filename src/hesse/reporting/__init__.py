"""What a person reads."""

from hesse.reporting.terminal import compression_summary, cost_table, evaluation_table, methods_table

__all__ = ["compression_summary", "cost_table", "evaluation_table", "methods_table"]
