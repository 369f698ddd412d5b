"""Inspection: the loss around a model's weights, and the accuracy of each curvature approximation."""

from hesse.inspection.inspect import Inspection
from hesse.inspection.layers import SCHEMES, LayerInspection

__all__ = ["SCHEMES", "Inspection", "LayerInspection"]
