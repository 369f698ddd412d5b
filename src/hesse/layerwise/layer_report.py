"""Report of one solved layer."""

import torch
from torch import Tensor

from hesse.constraints import Constraint, LowRank, Plus
from hesse.estimation.statistics.output_factor import output_factor
from hesse.layerwise.layer_solver import LayerProblem, Solved, effect
from hesse.layerwise.report import LayerReport


def layer_report(problem: LayerProblem, solved: Solved, stored: Tensor, bits: float) -> tuple[LayerReport, list[str]]:
    """Return the report of a layer's change and cost, and notes.

    `stored` (out, in) is the new weight as stored, with `bits` bits per weight.
    """
    weight, gram, factor = problem.weight, problem.gram, output_factor(problem.statistics)
    notes = []
    if factor is None and gram.tokens:
        notes.append(f"{problem.name}: no prediction: the tokens that probed the loss did not reach it")
    made = effect(stored - weight, gram, factor if gram.tokens else None)
    whole = 2 * gram.quadratic(weight)  # E‖W x‖²
    report = LayerReport(
        name=problem.name,
        shape=(weight.shape[0], weight.shape[1]),
        method=solved.method,
        tokens=gram.tokens,
        damping=solved.damping,
        bits_per_weight=bits,
        sparsity=1 - int(torch.count_nonzero(stored)) / stored.numel(),
        rank=_rank(problem.constraint, weight),
        predicted_loss_increase=made.loss_increase,
        relative_output_error=made.squared_error / whole if whole > 0 else None,
    )
    return report, notes


def _rank(constraint: Constraint, weight: Tensor) -> int | None:
    """Return the rank of a weight's low-rank factors; None without factors."""
    if isinstance(constraint, Plus):
        return _rank(constraint.correction, weight)
    return min(constraint.rank, *weight.shape) if isinstance(constraint, LowRank) else None
