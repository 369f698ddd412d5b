"""Calibration and evaluation data: from text or ready tokens to samples."""

from hesse.data.samples import Samples, read_samples

__all__ = ["Samples", "read_samples"]
