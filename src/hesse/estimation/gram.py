"""The Gram of a layer's inputs, summed over batches as they flow by."""

import torch
from torch import Tensor

from hesse.curvature import Gram
from hesse.errors import DataError

LEAF = 128  # columns; below this a product is too small to run at full rate


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
        _add_upper(self.total, flat)

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


def _add_upper(total: Tensor, flat: Tensor) -> None:
    """Add flatᵀ flat (in, in) of `flat` (tokens, in) to `total`, at least on and above its diagonal.

    Halves are split again until they are narrow: large products throughout, and little more than half of the work.
    """
    columns = flat.shape[1]
    if columns <= LEAF:
        total.addmm_(flat.T, flat)
        return
    middle = columns // 2
    _add_upper(total[:middle, :middle], flat[:, :middle])
    _add_upper(total[middle:, middle:], flat[:, middle:])
    total[:middle, middle:].addmm_(flat[:, :middle].T, flat[:, middle:])
