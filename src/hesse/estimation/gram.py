"""The Gram of a layer's inputs, summed over batches as they flow by."""

import torch
from torch import Tensor

from hesse.curvature import Gram
from hesse.errors import DataError

# Columns computed together. Only the upper triangle's panels are multiplied, which saves up to half of the work; below
# this width a panel is too thin for the matrix product to run at full rate.
PANEL = 256


class GramAccumulator:
    """Σ xxᵀ over tokens in float32, and the number of tokens."""

    def __init__(self, name: str, width: int, device: torch.device) -> None:
        self.name = name
        self.total = torch.zeros(width, width, device=device)
        self.tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Add `inputs` (..., in)."""
        flat = inputs.reshape(-1, inputs.shape[-1]).float()
        self.tokens += flat.shape[0]
        for start in range(0, flat.shape[1], PANEL):
            self.total[start : start + PANEL, start:].addmm_(flat[:, start : start + PANEL].T, flat[:, start:])

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
        upper = self.total.triu()
        return Gram(second_moment=(upper + upper.triu(1).T) / max(self.tokens, 1), tokens=self.tokens)
