"""Invertible maps of the features that pass between layers, and what they make of the weights on either side."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Map(ABC):
    """A map T of n features: who writes them writes T y, and who reads them undoes T first.

    The features are `heads` of equal size, one head where they are not divided, and T acts in each. Readers may see
    each head several times in a row, as grouped attention repeats its values: they have a multiple of n columns.
    """

    values: Tensor  # (heads, size) or (heads, size, size)

    @abstractmethod
    def on_outputs(self, weight: Tensor) -> Tensor:
        """T W, of a weight (n, in) whose rows are the features."""

    @abstractmethod
    def on_inputs(self, weight: Tensor) -> Tensor:
        """W T⁻¹, of a weight (out, n · repeats) whose columns are the features."""

    def _by_head(self, weight: Tensor) -> Tensor:
        """The columns of `weight` as (out, heads, repeats, size)."""
        heads, size = self.values.shape[:2]
        return weight.view(len(weight), heads, -1, size)


class Scaling(Map):
    """T = diag(t): feature j is written t_j times as large."""

    def on_outputs(self, weight: Tensor) -> Tensor:
        return self.values.to(weight).view(-1, 1) * weight

    def on_inputs(self, weight: Tensor) -> Tensor:
        return (self._by_head(weight) / self.values.to(weight)[:, None]).reshape(weight.shape)


class Folding(Map):
    """What readers make of a norm whose scales w they take in: the norm's become 1, and W becomes W diag(w).

    T = diag(1/w), said so that scales may be 0.
    """

    def on_outputs(self, weight: Tensor) -> Tensor:
        return torch.ones_like(weight)

    def on_inputs(self, weight: Tensor) -> Tensor:
        return (self._by_head(weight) * self.values.to(weight)[:, None]).reshape(weight.shape)


class Rotation(Map):
    """T = R, orthogonal, one (size, size) for each head."""

    def on_outputs(self, weight: Tensor) -> Tensor:
        heads, size = self.values.shape[:2]
        return (self.values.to(weight) @ weight.view(heads, size, -1)).reshape(weight.shape)

    def on_inputs(self, weight: Tensor) -> Tensor:
        return torch.einsum("ohrk,hjk->ohrj", self._by_head(weight), self.values.to(weight)).reshape(weight.shape)
