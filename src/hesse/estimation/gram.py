"""The Gram of a layer's inputs, summed over batches as they flow by."""

import torch
from torch import Tensor

from hesse.curvature import Gram
from hesse.curvature.symmetric import add_upper, mirrored
from hesse.errors import DataError


class GramAccumulator:
    """Σ xxᵀ over tokens in float32, and the number of tokens."""

    def __init__(self, name: str, width: int, device: torch.device) -> None:
        self.name = name
        self.total = torch.zeros(width, width, device=device)
        self.tokens = 0
        self._wide = self.total[:0]  # inputs in float32; kept, since fresh memory costs more than what is done with it

    def add(self, inputs: Tensor) -> None:
        """Add `inputs` (..., in)."""
        flat = inputs.reshape(-1, inputs.shape[-1])
        self.tokens += flat.shape[0]
        if flat.dtype != torch.float32:
            if len(self._wide) < len(flat):
                self._wide = torch.empty_like(flat, dtype=torch.float32)
            flat = self._wide[: len(flat)].copy_(flat)
        add_upper(self.total, flat)

    def gram(self) -> Gram:
        """The Gram per token; zero if there were no tokens.

        Raises:
            DataError: an input was NaN or infinite.
        """
        if not bool(torch.isfinite(self.total).all()):
            raise DataError(
                f"the inputs of {self.name} hold NaN or infinity: the model overflows on this data in its own "
                "precision, or its weights are damaged"
            )
        return Gram(second_moment=mirrored(self.total) / max(self.tokens, 1), tokens=self.tokens)
