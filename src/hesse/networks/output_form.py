"""Form of what a block returns, so that a stub can return as much in its place."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class OutputForm:
    """What a block returns: hidden states alone, or first in a tuple with `rest`."""

    is_tuple: bool
    rest: tuple[tuple[torch.Size, torch.dtype] | None, ...] = ()  # of one sample; None for what is no tensor

    @classmethod
    def of(cls, output: Any) -> "OutputForm":
        """Return the form of what a block returned for one sample."""
        if not isinstance(output, tuple | list):
            return cls(False)
        rest = (x if isinstance(x, Tensor) else None for x in output[1:])
        return cls(True, tuple(None if x is None else (x.shape, x.dtype) for x in rest))

    def zeros(self, hidden: Tensor) -> list[Tensor | None]:
        """Return zeros in the place of `rest` for the samples of `hidden`."""
        made: list[Tensor | None] = []
        for entry in self.rest:
            zeros = None if entry is None else torch.zeros(entry[0], dtype=entry[1], device=hidden.device)
            if zeros is not None and zeros.shape[:1] == (1,):
                zeros = zeros.expand(len(hidden), *zeros.shape[1:])
            made.append(zeros)
        return made
