"""Optimizer of Only Train Once, which sets whole groups of weights to zero."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from hesse.errors import OptionError
from hesse.partitions import GroupParts


class HalfSpace(torch.optim.Optimizer):
    """Half-space stochastic projected gradient on f(w) + λ Σ_g ‖w_g‖; it sets groups to zero.

    `parts` are the groups, with the entries that produce them. Every step computes the trial
    w̃ = w - rate · (∇f + λ w_g / ‖w_g‖). From step `warmup` on, a group whose trial is outside of the half-space
    ⟨w̃_g, w_g⟩ ≥ ε ‖w_g‖² is set to zero permanently. Source: Only Train Once (Chen et al., 2021, arXiv:2107.07467).
    """

    def __init__(
        self,
        named: Sequence[tuple[str, nn.Parameter]],
        parts: GroupParts,
        rate: float,
        penalty: float,
        margin: float,
        warmup: int,
    ) -> None:
        if not (rate > 0 and penalty >= 0 and 0 <= margin < 1 and warmup >= 0):
            raise OptionError(
                f"rate {rate}, penalty {penalty}, margin {margin}, warmup {warmup}: use a rate above 0, a margin from "
                "0 to 1, and no negative numbers"
            )
        super().__init__([parameter for _, parameter in named], {"lr": rate})
        self.named, self.parts = dict(named), parts
        self.penalty, self.margin, self.warmup = penalty, margin, warmup
        self.steps = 0
        self.zeroed = torch.zeros(parts.count, dtype=torch.bool)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Perform one step, from the parameters' gradients."""
        rate = self.param_groups[0]["lr"]
        old = {name: self.named[name].detach().clone() for name in self.parts.shapes}
        squares = self.parts.sums({name: tensor.square() for name, tensor in old.items()})
        pulls = self.parts.spread(self.penalty / squares.sqrt().clamp(min=1e-12), old, 0.0)
        for name, parameter in self.named.items():
            direction = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            if name in old:
                direction = direction + pulls[name] * old[name]
            parameter.sub_(rate * direction)
        if self.steps >= self.warmup:
            inner = self.parts.sums({name: self.named[name] * old[name] for name in old})
            self.zeroed |= (inner < self.margin * squares).cpu()
        for name, factor in self.parts.spread((~self.zeroed).to(squares), old, 1.0).items():
            self.named[name].mul_(factor)
        self.steps += 1
