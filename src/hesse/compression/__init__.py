"""The main job: compress a checkpoint from disk to disk, and say what it cost."""

from hesse.compression.compress import compress_checkpoint
from hesse.compression.plan import Calibration
from hesse.compression.report import CompressionReport, LayerReport, Verification

__all__ = ["Calibration", "CompressionReport", "LayerReport", "Verification", "compress_checkpoint"]
