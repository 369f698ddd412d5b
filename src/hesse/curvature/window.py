"""Gradient window: a sliding sum of rank-one terms over the last m gradients of a stream."""

import torch
from torch import Tensor

from hesse.curvature.rank_one_sum import RankOneSum
from hesse.errors import DataError, OptionError
from hesse.finite import all_finite


class GradientWindow:
    """A sliding window of at most `size` gradients of shape `shape`, updated without rebuilding.

    Adding or replacing a gradient costs O(d m), and the next inverse product O(m³) more. Source: the dynamic algorithm
    of M-FAC (Frantar, Kurtic and Alistarh, 2021), with the inner products kept instead of its recursion.
    """

    def __init__(
        self,
        size: int,
        shape: torch.Size | tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if size < 1:
            raise OptionError(f"a window of {size} gradients was requested: use 1 or more")
        self._rows = torch.zeros(size, *shape, dtype=dtype, device=device)
        self._inner_products = torch.zeros(size, size, dtype=torch.float64, device=device)
        self._count = 0
        self._next = 0

    def __len__(self) -> int:
        return self._count

    def push(self, gradient: Tensor) -> None:
        """Add `gradient` (*shape), replacing the oldest one if the window is full.

        Raises:
            OptionError: the gradient has another shape.
            DataError: the gradient is not finite; the window is unchanged.
        """
        if gradient.shape != self._rows.shape[1:]:
            raise OptionError(
                f"a gradient of shape {tuple(gradient.shape)} does not fit a window of {tuple(self._rows.shape[1:])}"
            )
        if not all_finite(gradient):
            raise DataError("the gradient holds NaN or infinity")
        place, count = self._next, max(self._count, self._next + 1)
        self._rows[place] = gradient
        row = self._sum(count).along(self._rows[place])
        self._inner_products[place, :count] = row
        self._inner_products[:count, place] = row
        self._count, self._next = count, (place + 1) % len(self._rows)

    def curvature(self, damping: float = 0.0) -> RankOneSum:
        """Return the RankOneSum of the gradients in the window, with λ = `damping`.

        It shares the window's memory: the next `push` invalidates it.

        Raises:
            DataError: the window is empty.
        """
        if not self._count:
            raise DataError("the window holds no gradient yet")
        return self._sum(self._count).with_damping(damping)

    def _sum(self, count: int) -> RankOneSum:
        return RankOneSum(gradients=self._rows[:count], inner_products=self._inner_products[:count, :count])
