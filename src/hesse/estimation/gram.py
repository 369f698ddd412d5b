"""Accumulate the Gram of a layer's inputs over batches."""

import torch
from torch import Tensor

from hesse.curvature import Gram
from hesse.curvature.symmetric import add_upper, multiplies_exactly, symmetric_from_upper
from hesse.errors import DataError
from hesse.finite import all_finite


class GramAccumulator:
    """Sum of xxᵀ over tokens in float32, and the number of tokens; with reference inputs x₀ also the sum of x x₀ᵀ."""

    def __init__(self, name: str, width: int, device: torch.device) -> None:
        self.name = name
        self.total = torch.zeros(width, width, device=device)
        self.cross: Tensor | None = None
        self.tokens = 0
        self._wide = self.total[:0]  # inputs in float32; reused, because allocating costs more than the conversion

    def add(self, inputs: Tensor, reference: Tensor | None = None) -> None:
        """Add `inputs` (..., in), and the same inputs in another stream, always or never.

        Raises:
            DataError: some inputs came with a reference and some without, or of another shape.
        """
        flat = inputs.reshape(-1, inputs.shape[-1])
        if self.tokens and (reference is None) != (self.cross is None):
            raise DataError(f"some inputs of {self.name} came with a reference and some without: give it with all")
        self.tokens += flat.shape[0]
        if flat.dtype != torch.float32 and not multiplies_exactly(flat):
            if len(self._wide) < len(flat):
                self._wide = torch.empty_like(flat, dtype=torch.float32)
            flat = self._wide[: len(flat)].copy_(flat)
        add_upper(self.total, flat)
        if reference is not None:
            if reference.shape != inputs.shape:
                raise DataError(f"the inputs of {self.name} and their reference differ in shape")
            if self.cross is None:
                self.cross = torch.zeros_like(self.total)
            self.cross.addmm_(flat.T.to(self.cross), reference.reshape(flat.shape).to(self.cross))

    def gram(self) -> Gram:
        """Return the Gram per token; zero if there were no tokens.

        Raises:
            DataError: an input was NaN or infinite.
        """
        sums = [self.total] if self.cross is None else [self.total, self.cross]
        if not all(all_finite(total) for total in sums):
            raise DataError(
                f"the inputs of {self.name} hold NaN or infinity: the model overflows on this data in its own "
                "precision, or its weights are damaged"
            )
        tokens = max(self.tokens, 1)
        cross = None if self.cross is None else self.cross / tokens
        return Gram(second_moment=symmetric_from_upper(self.total) / tokens, tokens=self.tokens, cross_moment=cross)
