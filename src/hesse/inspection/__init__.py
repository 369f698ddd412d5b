"""What the loss looks like around a model, and which approximation of it to trust."""

from hesse.inspection.inspect import Inspection, inspect_checkpoint
from hesse.inspection.layers import SCHEMES, LayerInspection

__all__ = ["SCHEMES", "Inspection", "LayerInspection", "inspect_checkpoint"]
