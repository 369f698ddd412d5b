"""Checkpoints in the forms that other runtimes take."""

from hesse.exporting.export import TARGETS, export_checkpoint, find_target
from hesse.exporting.report import ExportedLayer, ExportReport

__all__ = ["TARGETS", "ExportReport", "ExportedLayer", "export_checkpoint", "find_target"]
