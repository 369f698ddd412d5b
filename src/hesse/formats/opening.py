"""Open a dense checkpoint as a network."""

from pathlib import Path

import torch

from hesse.checkpoints.checkpoint import Checkpoint
from hesse.errors import CheckpointError
from hesse.formats import open_checkpoint
from hesse.networks.network import CheckpointNetwork


def open_networks(model: Path, device: torch.device) -> tuple[Checkpoint, CheckpointNetwork, CheckpointNetwork]:
    """Open a dense checkpoint; return it with its network in float32 and in the type that calibration runs in.

    Raises:
        HesseError: the model is damaged, unsupported, or already compressed.
    """
    checkpoint = open_checkpoint(model)
    if type(checkpoint) is not Checkpoint:
        raise CheckpointError(f"{model} is already compressed: start from the dense model it was made from")
    dense = CheckpointNetwork(checkpoint, torch.float32, device)
    return checkpoint, dense, dense.in_dtype(_compute_dtype(checkpoint, dense, device))


def _compute_dtype(checkpoint: Checkpoint, network: CheckpointNetwork, device: torch.device) -> torch.dtype:
    """Return the weights' own type if the device multiplies it fast, else float32."""
    stored = checkpoint.dtype(f"{network.layers[0].name}.weight")
    if device.type == "cuda":
        return stored
    native = torch.cpu.get_capabilities()
    fast = stored == torch.bfloat16 and any(native.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if fast else torch.float32
