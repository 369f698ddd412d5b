"""Per-sample gradients of an objective, a few samples at a time."""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import grad, vmap

from hesse.curvature import BlockAccumulator, BlockRankOneSum, Diagonal, Objective, RankOneSum
from hesse.errors import DataError, OptionError

Kind = Literal["sampled", "empirical"]
BUDGET = 1 << 30  # bytes of gradients in memory at once


def per_sample_gradients(objective: Objective, kind: Kind, *, seed: int = 0, budget: int = BUDGET) -> Iterator[Tensor]:
    """The gradient of each sample's summed loss, as (samples, parameters), at most `budget` bytes of them at once.

    `kind="empirical"` takes the labels of the data, `"sampled"` draws one label a term from the model itself. Samples
    must not depend on one another: batch statistics are refused by the first layer that has them.

    Raises:
        DataError: a gradient is not finite.
        OptionError: the budget is smaller than one gradient.
    """
    if kind not in ("sampled", "empirical"):
        raise OptionError(f"the kind of gradients is 'sampled' or 'empirical', not {kind!r}")
    size = objective.size * objective.parameters[0].element_size()
    if budget < size:
        raise OptionError(f"one gradient takes {size} bytes, more than the budget of {budget}: use {size} or more")
    for inputs, targets in labelled(objective, kind, seed):
        for start in range(0, len(targets), budget // size):
            part = slice(start, start + budget // size)
            flat = _together(objective, _rows(inputs, part), targets[part])
            if not bool(torch.isfinite(flat).all()):
                raise DataError("a per-sample gradient holds NaN or infinity: the loss overflows on this data")
            yield flat


def _together(objective: Objective, inputs: Any, targets: Tensor) -> Tensor:
    """The gradients of a few samples (samples, parameters): at once, or one by one where vmap cannot follow."""
    parameters = tuple(p.detach() for p in objective.parameters)

    def summed(values: tuple[Tensor, ...], sample: Any, target: Tensor) -> Tensor:
        outputs = objective.outputs(_batched(sample), values)
        return objective.loss.terms(outputs, target.unsqueeze(0)).sum()

    try:
        gradients = vmap(grad(summed), in_dims=(None, 0, 0), randomness="different")(parameters, inputs, targets)
        return torch.cat([gradient.flatten(1) for gradient in gradients], dim=1)
    except RuntimeError as error:  # a path that depends on the data, such as that of a mixture of experts
        if "vmap" not in str(error):
            raise
    rows = []
    for k in range(len(targets)):
        one = slice(k, k + 1)
        loss = objective.loss.terms(objective.outputs(_rows(inputs, one)), targets[one]).sum()
        rows.append(objective.joined(torch.autograd.grad(loss, objective.parameters, allow_unused=True)))
    return torch.stack(rows)


def labelled(objective: Objective, kind: Kind, seed: int) -> Iterator[tuple[Any, Tensor]]:
    """The batches of the objective with the labels of `kind`."""
    for index, (inputs, targets) in enumerate(objective.batches()):
        if kind == "sampled":
            targets = objective.sampled_targets(index, inputs, targets, seed)
        yield inputs, targets


def fisher_diagonal(objective: Objective, kind: Kind, *, seed: int = 0, budget: int = BUDGET) -> Diagonal:
    """Diag of `Fisher(kind, per="sample")` over the flat parameters, in the unit of the objective's loss."""
    total = torch.zeros(objective.size, dtype=torch.float64, device=objective.parameters[0].device)
    for gradients in per_sample_gradients(objective, kind, seed=seed, budget=budget):
        total += gradients.double().square().sum(0)
    return Diagonal(values=(total * objective.scale).to(objective.parameters[0].dtype))


def fisher_rank_one_sum(objective: Objective, kind: Kind, *, seed: int = 0, budget: int = BUDGET) -> RankOneSum:
    """`Fisher(kind, per="sample")` with all gradients kept, scaled so that their mean square has the loss's unit."""
    gradients = torch.cat(list(per_sample_gradients(objective, kind, seed=seed, budget=budget)))
    return RankOneSum.from_gradients(gradients * (objective.scale * len(gradients)) ** 0.5)


def fisher_blocks(
    objective: Objective, kind: Kind, block_size: int, *, seed: int = 0, budget: int = BUDGET
) -> BlockRankOneSum:
    """The diagonal blocks of `Fisher(kind, per="sample")`; gradients are not kept."""
    parameter = objective.parameters[0]
    blocks = BlockAccumulator((objective.size,), block_size, parameter.dtype, parameter.device)
    for gradients in per_sample_gradients(objective, kind, seed=seed, budget=budget):
        blocks.add(gradients)
    return BlockRankOneSum(matrices=blocks.total * objective.scale, weight_shape=(objective.size,))


def _batched(sample: Any) -> Any:
    """One sample as a batch of one."""
    if isinstance(sample, Tensor):
        return sample.unsqueeze(0)
    if isinstance(sample, dict):
        return {key: _batched(value) for key, value in sample.items()}
    return type(sample)(_batched(value) for value in sample)


def _rows(inputs: Any, part: slice) -> Any:
    """Some samples of a batch."""
    if isinstance(inputs, Tensor):
        return inputs[part]
    if isinstance(inputs, dict):
        return {key: _rows(value, part) for key, value in inputs.items()}
    if isinstance(inputs, list | tuple):
        return type(inputs)(_rows(value, part) for value in inputs)
    raise OptionError(f"inputs of {type(inputs).__name__} cannot be taken apart into samples: give tensors")
