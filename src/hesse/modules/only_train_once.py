"""Only Train Once: train groups of weights to zero, then cut them out."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from hesse.errors import OptionError
from hesse.methods.strategies import STRATEGIES
from hesse.modules.sites import GroupStrategy, Removal, Sites, leave_one
from hesse.options import setting
from hesse.training import Training, finetune
from hesse.training.half_space import HalfSpace


@dataclass(frozen=True)
class OnlyTrainOnce(GroupStrategy):
    """Train the network so that whole groups become zero, and remove these: the outputs stay as they are.

    The network trains in the mode that it was in. Source: Chen et al., 2021, arXiv:2107.07467.
    """

    steps: int = setting(1000, "Steps of training, one batch each.")
    rate: float = setting(0.1, "Learning rate, which falls to 0.")
    penalty: float = setting(0.02, "Factor λ of the penalty λ Σ ‖w_g‖: more removes more groups.")
    margin: float = setting(0.5, "Margin ε of the half-space, from 0 to 1: more sets more groups to zero.")
    warmup: float = setting(0.5, "Share of the steps before groups are set to zero.")

    def check(self, kinds: Sequence[str]) -> None:
        if "experts" in kinds:
            raise OptionError("an expert with weights of zero is still chosen: train its hidden units instead")
        if not 0 <= self.warmup <= 1:
            raise OptionError(f"warmup is {self.warmup}, but is a share of the steps, from 0 to 1")

    def choose(self, sites: Sites) -> Removal:
        objective, parts = sites.objective, sites.partition.restricted("produced")
        optimizers: list[HalfSpace] = []

        def optimizer(named: Sequence[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
            warmup = int(self.warmup * self.steps)
            optimizers.append(HalfSpace(named, parts, self.rate, self.penalty, self.margin, warmup))
            return optimizers[0]

        training = Training(steps=self.steps, optimizer=optimizer, clip=None, seed=sites.seed)
        model, forward = objective.model, objective.forward
        model.train(sites.training)
        finetune(model, objective.data, training, loss_function=objective.loss, held={}, forward=forward)
        model.eval()
        zero = {id(group) for group, gone in zip(parts.groups, optimizers[0].zeroed.tolist(), strict=True) if gone}
        return Removal(
            {site: leave_one([g for g in some if id(g) in zero], some) for site, some in sites.groups.items()}
        )


STRATEGIES.register("only_train_once", OnlyTrainOnce)
