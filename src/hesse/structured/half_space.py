"""Training that makes whole groups zero, which then are cut out: Only Train Once."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hesse.curvature import Loss
from hesse.curvature.objective import Batch
from hesse.errors import OptionError
from hesse.structured.prune import cut, cuttable_sites, leaving_one, objective_of, report_of
from hesse.structured.report import StructuredReport, flops_of, parameters_of
from hesse.structured.sums import GroupSums, produced
from hesse.training import Training, recover


class HalfSpace(torch.optim.Optimizer):
    """Half-space stochastic projected gradient: f(w) + λ Σ_g ‖w_g‖ over groups, whose small ones become zero.

    Every step takes the trial w̃ = w - rate · (∇f + λ w_g / ‖w_g‖). From step `warmup` on, a group whose trial has left
    the half-space ⟨w̃_g, w_g⟩ ≥ ε ‖w_g‖² is set to zero, and stays there. Source: Only Train Once (Chen et al., 2021,
    arXiv:2107.07467).
    """

    def __init__(
        self,
        named: Sequence[tuple[str, nn.Parameter]],
        sums: GroupSums,
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
        self.named, self.sums = dict(named), sums
        self.penalty, self.margin, self.warmup = penalty, margin, warmup
        self.steps = 0
        self.gone = torch.zeros(sums.count, dtype=torch.bool)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step, from the parameters' gradients."""
        rate = self.param_groups[0]["lr"]
        old = {name: self.named[name].detach().clone() for name in self.sums.names}
        squares = self.sums.of({name: tensor.square() for name, tensor in old.items()})
        pulls = self.sums.spread(self.penalty / squares.sqrt().clamp(min=1e-12), old, 0.0)
        for name, parameter in self.named.items():
            direction = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            if name in old:
                direction = direction + pulls[name] * old[name]
            parameter.sub_(rate * direction)
        if self.steps >= self.warmup:
            inner = self.sums.of({name: self.named[name] * old[name] for name in old})
            self.gone |= (inner < self.margin * squares).cpu()
        for name, factor in self.sums.spread((~self.gone).to(squares), old, 1.0).items():
            self.named[name].mul_(factor)
        self.steps += 1


def only_train_once(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    steps: int,
    rate: float = 0.1,
    penalty: float = 0.02,
    margin: float = 0.5,
    warmup: float = 0.5,
    kinds: Sequence[str] | None = None,
    loss: Loss | nn.Module | None = None,
    forward: Callable[[nn.Module, Any], Tensor] | None = None,
    seed: int = 0,
) -> tuple[nn.Module, StructuredReport]:
    """Train a copy of `model` so that whole groups become zero, and cut these out: the outputs stay as they are.

    Args:
        model: any network whose groups can be traced; trained in the mode that it is in.
        batches: (inputs, targets) pairs, walked again and again.
        steps: of training, one batch each.
        rate: of the steps, which falls to 0.
        penalty: λ on Σ_g ‖w_g‖, which decides how many groups go.
        margin: ε of the half-space, from 0 to 1: more makes more groups zero.
        warmup: the share of steps before groups are set to zero.
        kinds: as for `prune_groups`, without experts; so are `loss` and `forward`.
        loss: see there.
        forward: see there.
        seed: of the training.

    Raises:
        HesseError: one of its kinds names what is wrong; the network is traced and cut once before it is trained.
    """
    if "experts" in (kinds or ()):
        raise OptionError("an expert with weights of zero is still chosen: train its neurons instead")
    if not 0 <= warmup <= 1:
        raise OptionError(f"warmup is {warmup}, but is a share of the steps, from 0 to 1")
    objective = objective_of(model, batches, loss, forward)
    sites = cuttable_sites(objective, kinds)
    before = (parameters_of(model), flops_of(objective), objective.value())
    groups = [group for some in sites.values() for group in some]
    sums = GroupSums.over(groups, objective.model, produced)
    made: list[HalfSpace] = []

    def optimizer(named: Sequence[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        made.append(HalfSpace(named, sums, rate, penalty, margin, int(warmup * steps)))
        return made[0]

    training = Training(steps=steps, optimizer=optimizer, clip=None, seed=seed)
    objective.model.train(model.training)
    recover(objective.model, objective.data, training, loss=objective.loss, held={}, forward=forward)
    objective.model.eval()
    zero = {id(group) for group, gone in zip(groups, made[0].gone.tolist(), strict=True) if gone}
    gone = {site: leaving_one([g for g in some if id(g) in zero], some) for site, some in sites.items()}
    sliced, difference = cut(objective, gone)
    return sliced, report_of("only-train-once", model, sliced, objective, sites, gone, before, difference, None)
