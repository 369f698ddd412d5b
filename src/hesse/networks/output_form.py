"""Form of what a block returns, so that a stub can return as much in its place."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Element:
    """Tensor that a block returns next to hidden states."""

    shape: torch.Size  # of one sample
    dtype: torch.dtype
    argument: str | None = None  # the block's argument that it is
    constant: bool = False  # it is the same for all hidden states of a shape

    def zeros(self, hidden: Tensor) -> Tensor:
        """Return zeros of the shape for the samples of `hidden`."""
        zeros = torch.zeros(self.shape, dtype=self.dtype, device=hidden.device)
        return zeros.expand(len(hidden), *zeros.shape[1:]) if zeros.shape[:1] == (1,) else zeros


@dataclass(frozen=True)
class OutputForm:
    """Form of a block's output: hidden states alone, or first in a tuple with `rest`."""

    is_tuple: bool
    rest: tuple[Element | None, ...] = ()  # None for what is no tensor
