"""The main job: compress a checkpoint from disk to disk, and say what it cost."""

from hesse.compression.budget import Budget, BudgetPlan, BudgetRequest, plan_budget
from hesse.compression.compress import compress_checkpoint
from hesse.compression.drop_blocks import DropRequest, drop_blocks_checkpoint
from hesse.compression.drop_report import DroppedBlock, DropReport
from hesse.compression.estimate import estimate_checkpoint
from hesse.compression.measurements import (
    Continuation,
    LayerMeasurement,
    LinePoint,
    Measured,
    Measurements,
    TextMeasurement,
)
from hesse.compression.narrow import NarrowedBlock, NarrowReport, narrow_checkpoint
from hesse.compression.repair import RepairRequest, repair_checkpoint
from hesse.compression.repair_report import RepairedLayer, RepairReport
from hesse.compression.report import CompressionReport, LayerReport, Verification
from hesse.compression.rotate import RotationReport, rotate_checkpoint
from hesse.compression.tokens import Calibration

__all__ = [
    "Budget",
    "BudgetPlan",
    "BudgetRequest",
    "Calibration",
    "CompressionReport",
    "Continuation",
    "DropReport",
    "DropRequest",
    "DroppedBlock",
    "LayerMeasurement",
    "LayerReport",
    "LinePoint",
    "Measured",
    "Measurements",
    "NarrowReport",
    "NarrowedBlock",
    "RepairReport",
    "RepairRequest",
    "RepairedLayer",
    "RotationReport",
    "TextMeasurement",
    "Verification",
    "compress_checkpoint",
    "drop_blocks_checkpoint",
    "estimate_checkpoint",
    "narrow_checkpoint",
    "plan_budget",
    "repair_checkpoint",
    "rotate_checkpoint",
]
