"""CrAM, the compression-aware minimiser: a dense network that survives being pruned in one shot."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hesse.constraints import Sparse
from hesse.errors import OptionError
from hesse.training.loop import NamedGradients, StepRule


@dataclass(frozen=True)
class CompressionAware(StepRule):
    """StepRule with the direction ∇L(w) + m ⊙ ∇L(C(w + rho · ∇L(w))), which takes two gradients per step.

    C prunes the weights `names` by magnitude to one of `patterns`, drawn at random in each step, and m is its mask; all
    other weights are only perturbed. This is CrAM+, whose first term preserves the dense model's accuracy; rho is not
    scaled by the gradient's norm. Source: Peste et al., 2022, arXiv:2207.14200.

    Raises:
        OptionError: there is no name or no pattern, or rho is not above 0.
    """

    names: tuple[str, ...]
    patterns: tuple[Sparse, ...] = (Sparse(0.5), Sparse(0.7), Sparse(0.9))
    rho: float = 0.05

    def __post_init__(self) -> None:
        if not self.names or not self.patterns:
            raise OptionError("CompressionAware prunes nothing: give the names of some weights, and some patterns")
        if not self.rho > 0:
            raise OptionError(f"rho is {self.rho}, but must be above 0; 0.05 is usual")

    def check(self, weights: Mapping[str, nn.Parameter]) -> None:
        for name in self.names:
            if name not in weights:
                raise OptionError(f"{name!r}, which is to be pruned in each step, is not a trained parameter")
            for pattern in self.patterns:
                pattern.check(weights[name].flatten(1).shape)

    def direction(
        self, weights: Mapping[str, nn.Parameter], gradients: Callable[[], NamedGradients], step: int
    ) -> NamedGradients:
        """Return the sum of both gradients."""
        pattern = self.patterns[int(torch.randint(len(self.patterns), ()))]
        dense = gradients()
        before = {name: weight.detach().clone() for name, weight in weights.items()}
        masks: dict[str, Tensor] = {}
        try:
            for name, gradient in dense.items():
                weights[name].data.add_(gradient, alpha=self.rho)
            for name in self.names:
                moved = weights[name].data
                masks[name] = pattern.mask(moved.flatten(1).square()).view(moved.shape)
                moved.mul_(masks[name])
            pruned = gradients()
        finally:
            for name, weight in weights.items():
                weight.data.copy_(before[name])
        return {
            name: gradient + pruned[name] * masks[name] if name in masks else gradient + pruned[name]
            for name, gradient in dense.items()
        }
