"""Solve one layer, put the solution in its place, and report it: the same for a checkpoint and for a module."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from hesse.constraints import Constraint, LowRank, Plus, Table
from hesse.estimation.statistics.output_factor import output_factor
from hesse.layerwise.layer_solver import LayerProblem, LayerSolver, Solved, effect
from hesse.methods.recipe import Rule
from hesse.networks.network import Layer
from hesse.progress import Clock


@dataclass(frozen=True)
class LayerReport:
    """One compressed layer; `predicted_loss_increase` is in nats per token (None without curvature for it)."""

    name: str
    shape: tuple[int, int]
    method: str  # curvature × constraint × solver
    tokens: int
    damping: float  # share of the Gram's mean eigenvalue
    bits_per_weight: float
    sparsity: float  # share of zeros
    rank: int | None  # of a layer that is stored as two factors
    predicted_loss_increase: float | None
    relative_output_error: float | None  # E‖(W' - W)x‖² / E‖Wx‖²
    input_bits: int | None = None  # bits that a loader rounds the layer's inputs to
    predicted_input_loss: float | None = None  # of rounding inputs, in nats per token, apart from the weights'


class Storage(Protocol):
    """Storage of solved layers."""

    def constraint(self, name: str) -> Constraint | None:
        """Return the constraint of a layer as it can be stored; None leaves the layer unchanged."""

    def as_stored(self, name: str, encoded: Any, weight: Tensor) -> Tensor:
        """Return the values that are stored for `weight` (out, in), which is solved as `encoded`."""

    def stored_bits(self, name: str) -> float:
        """Return the bits of a weight of a layer."""


@dataclass(frozen=True, eq=False)
class SolvedLayer:
    """A layer whose weight is now a member of its constraint."""

    report: LayerReport
    notes: list[str]
    encoded: Any  # as the constraint stores it
    stored: Tensor  # (out, in), the values that are stored


def solve_layer(
    layer: Layer, statistics: Mapping[str, Any], rule: Rule, storage: Storage, solver: LayerSolver, clock: Clock
) -> SolvedLayer:
    """Solve a layer by its rule for its statistics, and put the result in its place.

    Raises:
        HesseError: the layer cannot be solved; the message begins with its name.
    """
    constraint = storage.constraint(layer.name)
    assert constraint is not None
    with clock.phase("solve"):
        problem = LayerProblem(layer.name, layer.weight.detach().float(), dict(statistics), rule, constraint)
        solved = solver.solve(problem)
        encoded = solved.solution.encoded
        stored = storage.as_stored(layer.name, encoded, solved.solution.weight)
        layer.replace(stored)
    with clock.phase("predict"):
        report, notes = _report(problem, solved, stored.float(), storage.stored_bits(layer.name))
        if rule.input_bits is not None:
            cost, factor, peak = None, output_factor(problem.statistics), problem.statistics.get("input peaks")
            if factor is not None and isinstance(constraint, Table):
                cost = float_rounding_cost(stored, factor, problem.gram.diagonal())
            elif factor is not None and peak is not None:
                cost = rounding_cost(stored, factor, peak, rule.input_bits)
            else:
                notes.append(f"{layer.name}: the prediction leaves out that its inputs are rounded")
            report = replace(report, input_bits=rule.input_bits, predicted_input_loss=cost)
    return SolvedLayer(report, [*solved.notes, *notes], encoded, stored)


def _report(problem: LayerProblem, solved: Solved, stored: Tensor, bits: float) -> tuple[LayerReport, list[str]]:
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


def rounding_cost(weight: Tensor, output_factor: Tensor, square_peak: float, bits: int) -> float:
    """Return ½ tr(G W Cov(e) Wᵀ) in nats per token, for the rounding errors e of a layer's inputs.

    Each token has its own step s = 2 max|x| / (2^bits - 1). Its errors are assumed uniform in ±s/2 and independent, so
    Cov(e) = E[s²]/12 · I, except for the largest input, which lies half-way between two codes and adds 2/in. If a few
    inputs are large and the others far below a step, the true errors are smaller. `weight` is (out, in),
    `output_factor` is E[ggᵀ] (out, out) or its diagonal (out,), `square_peak` is E[max|x|²] over tokens.
    """
    variance = 4 * square_peak / ((1 << bits) - 1) ** 2 / 12 * (1 + 2 / weight.shape[1])
    factor = output_factor.to(weight)
    weighed = factor @ weight if factor.ndim == 2 else factor[:, None] * weight
    weighted = float(torch.linalg.vecdot(weighed, weight).double().sum())
    return 0.5 * variance * weighted


def float_rounding_cost(weight: Tensor, output_factor: Tensor, squares: Tensor) -> float:
    """Return ½ tr(G W Cov(e) Wᵀ) in nats per token, for inputs rounded to FP8 with three bits of mantissa.

    An input x in [2^k, 2^(k+1)) has the step 2^(k-3), and an error uniform in half a step to either side. If log x is
    uniform too, E[4^k] = E[x²] · 2 ln 2 / 3. Subnormal inputs, whose errors are larger than that, are few.
    `weight` is (out, in), `output_factor` is E[ggᵀ] (out, out) or its diagonal (out,), `squares` is E[x²] (in,).
    """
    step = 2.0**-6 * 2 * math.log(2) / 3  # E[step²] / E[x²]
    factor, variance = output_factor.to(weight), step / 12 * squares.to(weight)
    weighed = factor @ weight if factor.ndim == 2 else factor[:, None] * weight
    return 0.5 * float(((weighed * weight).sum(0) * variance).double().sum())


def digest(weight: Tensor) -> str:
    """Return a digest of a weight's exact float32 values, to compare with the weight that is read back from disk."""
    values = weight.detach().to("cpu", torch.float32).contiguous()
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()
