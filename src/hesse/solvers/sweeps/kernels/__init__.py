"""The sweeps of rounding as fused GPU kernels in Triton, which PyTorch for CUDA includes.

The modules of this folder import Triton; this file does not, so that `run_on` works without it.
"""

from importlib.util import find_spec

import torch

_INSTALLED = find_spec("triton") is not None


def run_on(device: torch.device) -> bool:
    """Return True if sweeps over tensors on `device` run in the kernels: a GPU, with Triton installed."""
    return _INSTALLED and device.type == "cuda"
