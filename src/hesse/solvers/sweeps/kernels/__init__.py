"""The sweeps of rounding as fused kernels for a GPU, written in Triton, which PyTorch for CUDA brings along.

Triton is imported by the modules of this folder and not here, so that whoever has none can ask `run_on`.
"""

from importlib.util import find_spec

import torch

_INSTALLED = find_spec("triton") is not None


def run_on(device: torch.device) -> bool:
    """Whether sweeps over tensors on `device` run in the kernels: a GPU, with Triton installed."""
    return _INSTALLED and device.type == "cuda"
