"""Invertible maps of the features that pass between layers, and their effect on the weights on both sides."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class FeatureMap(ABC):
    """Invertible map T of n features: layers that write them write T y, and layers that read them apply T⁻¹ first.

    The features are divided into heads of equal size (possibly one), and T acts within each head. Readers may receive
    each head several times in a row, as grouped attention repeats its values; they then have a multiple of n columns.
    """

    values: Tensor  # (heads, size) or (heads, size, size)

    @abstractmethod
    def on_outputs(self, weight: Tensor) -> Tensor:
        """Return T W, for a weight (n, in) whose rows are the features."""

    @abstractmethod
    def on_inputs(self, weight: Tensor) -> Tensor:
        """Return W T⁻¹, for a weight (out, n · repeats) whose columns are the features."""

    def _by_head(self, weight: Tensor) -> Tensor:
        """Return `weight` with its columns as (out, heads, repeats, size)."""
        heads, size = self.values.shape[:2]
        return weight.view(len(weight), heads, -1, size)


class Scaling(FeatureMap):
    """Map T = diag(t): feature j is written t_j times as large."""

    def on_outputs(self, weight: Tensor) -> Tensor:
        return self.values.to(weight).view(-1, 1) * weight

    def on_inputs(self, weight: Tensor) -> Tensor:
        return (self._by_head(weight) / self.values.to(weight)[:, None]).reshape(weight.shape)


class Folding(FeatureMap):
    """Map that moves a norm's scales w into its readers: the norm's scales become 1, and W becomes W diag(w).

    T = diag(1/w), written so that scales may be 0.
    """

    def on_outputs(self, weight: Tensor) -> Tensor:
        return torch.ones_like(weight)

    def on_inputs(self, weight: Tensor) -> Tensor:
        return (self._by_head(weight) * self.values.to(weight)[:, None]).reshape(weight.shape)


class Rotation(FeatureMap):
    """Map T = R, with one orthogonal matrix (size, size) per head."""

    def on_outputs(self, weight: Tensor) -> Tensor:
        heads, size = self.values.shape[:2]
        return (self.values.to(weight) @ weight.view(heads, size, -1)).reshape(weight.shape)

    def on_inputs(self, weight: Tensor) -> Tensor:
        return torch.einsum("ohrk,hjk->ohrj", self._by_head(weight), self.values.to(weight)).reshape(weight.shape)
