"""Only Train Once: train groups of weights to zero, then cut them out."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hesse.curvature import Loss
from hesse.curvature.objective import Batch
from hesse.errors import OptionError
from hesse.modules.group_report import StructuredReport, flops_of, parameters_of
from hesse.modules.prune_groups import cut, cuttable_sites, leaving_one, objective_of, report_of
from hesse.scores.group_sums import GroupSums, produced
from hesse.training import Training, recover
from hesse.training.half_space import HalfSpace


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
