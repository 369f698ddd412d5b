"""Estimate several curvatures from one pass of data: the sums that each needs, and the result from them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from hesse.curvature import BlockRankOneSum, Curvature, Diagonal, Gram, Kronecker, Objective, Origin, RankOneSum, Sum
from hesse.errors import DataError, OptionError, UnsupportedModelError
from hesse.estimation.sums import FlatGradients, GradientBlocks, GradientSquares, InputMoments, OutputMoments
from hesse.finite import all_finite
from hesse.passes.parts import ParameterPart
from hesse.passes.per_sample import BUDGET, FisherKind, GradientPass
from hesse.passes.recorded_batch import GradientUnit, RecordedBatch

Name = Literal["gram", "kronecker", "fisher", "blocks", "rank-one"]


class Accumulator(Protocol):
    """Sums over the recorded batches of a pass."""

    def add(self, passage: RecordedBatch) -> None:
        """Add a recorded batch."""


@dataclass(frozen=True, eq=False)
class Estimates:
    """Requested curvatures by parameter; only `rank_one` is for all parameters as one flat vector."""

    gram: dict[str, Gram] = field(default_factory=dict)
    kronecker: dict[str, Curvature] = field(default_factory=dict)
    fisher: dict[str, Diagonal] = field(default_factory=dict)
    blocks: dict[str, BlockRankOneSum] = field(default_factory=dict)
    rank_one: RankOneSum | None = None
    squared_norms: dict[str, Tensor] = field(default_factory=dict)  # with fisher: of each sample's gradient (samples,)


def estimate_curvatures(
    objective: Objective,
    curvatures: Sequence[Name],
    kind: FisherKind = "sampled",
    per: GradientUnit = "position",
    *,
    seed: int = 0,
    budget: int = BUDGET,
    block_size: int = 50,
) -> Estimates:
    """Estimate all curvatures in `curvatures` from one forward and one backward pass over the objective's data.

    - "gram": E[xxᵀ] of the inputs of each matrix (the weight of a linear, convolutional or embedding layer), over
      positions.
    - "kronecker": K-FAC. `per="position"` takes the positions of a sample (tokens, pixels) as independent samples
      (expand), `per="sample"` adds up the gradients and averages the inputs over them (reduce). A matrix gets its two
      factors, a bias E[ggᵀ], a norm's scale its diagonal; a weight tied between an embedding and a linear layer the sum
      of both. A convolution's weight is taken as (out, in · kernel). An embedding's input factor is diagonal: exactly
      so per position, only its diagonal per sample.
    - "fisher": the diagonal, "blocks": blocks of `block_size` weights on it, "rank-one": all gradients, kept, of the
      Fisher whose gradients are of whole samples.

    `kind="sampled"` draws labels from the model (the true Fisher, unbiased), `"empirical"` uses the labels of the data.
    Positions whose gradient is exactly zero, such as padding, are not counted. The unit is that of the objective's
    loss. `budget` bounds the bytes of recorded activations and gradients; it changes no result beyond rounding.
    Sources: Martens and Grosse, 2015; Grosse and Martens, 2016 (convolutions); Eschenhagen et al., 2023 (shared
    weights).

    Raises:
        OptionError: a curvature is not known, or a setting is not valid.
        UnsupportedModelError: a curvature needs a parameter's layer, and the parameter belongs to no supported layer.
        DataError: an input or a gradient is not finite, or no position has a gradient.
    """
    for name in curvatures:
        if name not in get_args(Name):
            raise OptionError(f"{name!r} is not a curvature estimated from data: use {', '.join(get_args(Name))}")
    if per not in get_args(GradientUnit):
        raise OptionError(f"factors are per 'position' or per 'sample', not {per!r}")
    kept = objective.size * objective.parameters[0].element_size() if "rank-one" in curvatures else 0
    apart = per == "sample" or not set(curvatures) <= {"gram", "kronecker"}
    walk = GradientPass(objective, kind, seed=seed, budget=budget, extra=kept, apart=apart)
    sums = Sums(walk.parts, objective.named, curvatures, per, block_size)
    for passage in walk:
        sums.add(passage)
    for other in walk.others if {"gram", "kronecker"} & set(curvatures) else []:
        if other in sums.without_factors and ("kronecker" not in curvatures or per == "sample"):
            continue
        raise UnsupportedModelError(
            f"{other} is no matrix, offset or scale of a supported layer, or is used otherwise than by its layer's "
            'call: leave it out, or ask for "fisher", which supports any parameter'
        )
    return sums.estimates(walk.scale, f"{kind} Fisher", f"{objective.loss.reduction} loss")


class Sums:
    """Sums that the requested curvatures need, each computed once."""

    def __init__(
        self,
        parts: dict[str, list[ParameterPart]],
        parameters: Mapping[str, Tensor],
        requested: Sequence[Name],
        per: GradientUnit = "position",
        block_size: int = 50,
    ) -> None:
        self.parts, self.requested, self.per = parts, set(requested), per
        every = [part for several in parts.values() for part in several]
        self.without_factors = {
            name: p for name, p in parameters.items() if not parts[name] or any(x.role == "scale" for x in parts[name])
        }
        self._inputs = InputMoments(every, per)
        self._positions = self._inputs if per == "position" else InputMoments(every, "position")
        self._outputs = OutputMoments(every, per)
        self._simple = GradientSquares(parts, self.without_factors, per)
        self._squares = GradientSquares(parts, parameters, "sample")
        self._blocks = GradientBlocks(parts, parameters, block_size) if "blocks" in requested else None
        self._flat = FlatGradients(parts, parameters)
        needs: dict[Name, list[Accumulator]] = {
            "gram": [self._positions],
            "kronecker": [self._inputs, self._outputs, self._simple],
            "fisher": [self._squares],
            "blocks": [] if self._blocks is None else [self._blocks],
            "rank-one": [self._flat],
        }
        self._wanted = list({id(s): s for name in needs if name in requested for s in needs[name]}.values())

    def add(self, passage: RecordedBatch) -> None:
        """Add a recorded batch."""
        for statistic in self._wanted:
            statistic.add(passage)

    def leave_out_unreached(self) -> None:
        """Remove the parameters of layers that no position with a gradient reached, such as an expert's."""
        reached = {key for sums in (self._inputs, self._positions) for key, moment in sums.sums.items() if moment.count}
        for name, parts in list(self.parts.items()):
            if name not in self._squares.sums and not all(part.modules in reached for part in parts):
                del self.parts[name]

    def estimates(self, scale: float, matrix: str, unit: str) -> Estimates:
        """Return the curvatures, with sums times `scale`; `matrix` and `unit` are recorded in their origin.

        Raises:
            DataError: a sum is not finite, or no sample reached a layer.
        """
        of_samples, of_factors = Origin(matrix, "sample", unit), Origin(matrix, self.per, unit)
        requested = self.requested
        return Estimates(
            gram=self._grams() if "gram" in requested else {},
            kronecker=self._kronecker(scale, of_factors) if "kronecker" in requested else {},
            fisher=self._diagonals(self._squares, scale, of_samples) if "fisher" in requested else {},
            blocks={} if self._blocks is None else self._blocks.curvatures(scale, of_samples),
            rank_one=self._flat.curvature(scale, of_samples) if "rank-one" in requested else None,
            squared_norms=self._squares.squared_norms() if "fisher" in requested else {},
        )

    def _grams(self) -> dict[str, Gram]:
        origin = Origin("layer output", "position", "squared output")
        found = {}
        for name, parts in self.parts.items():
            for part in parts:
                if part.role == "matrix":
                    second_moment = self._input(self._positions, part)
                    full = second_moment.diag() if second_moment.ndim == 1 else second_moment
                    count = self._positions.sums[part.modules].count
                    found[name] = Gram(second_moment=full, tokens=count, origin=origin)
        return found

    def _kronecker(self, scale: float, origin: Origin) -> dict[str, Curvature]:
        diagonals, found = self._diagonals(self._simple, scale, origin), dict[str, Curvature]()
        for name, parts in self.parts.items():
            terms = [diagonals[name]] if name in diagonals else [self._factors(p, scale, origin) for p in parts]
            found[name] = terms[0] if len(terms) == 1 else Sum(terms=tuple(terms))
        return found

    def _factors(self, part: ParameterPart, scale: float, origin: Origin) -> Curvature:
        moment = self._outputs.sums.get(part.modules)
        if moment is None or not moment.count:
            raise _unreached(part)
        outputs = moment.times(scale, f"output gradients of {part.modules[0]}")
        if part.role == "offset":
            return Gram(second_moment=outputs, tokens=moment.count, origin=origin)
        inputs = self._input(self._inputs, part)
        return Kronecker(output_factor=outputs, input_factor=inputs, transposed=part.transposed, origin=origin)

    def _input(self, sums: InputMoments, part: ParameterPart) -> Tensor:
        """Return E[xxᵀ] of a part's inputs; layers with the same inputs share the tensor."""
        moment = sums.sums.get(part.modules)
        if moment is None or not moment.count:
            raise _unreached(part)
        return moment.mean(f"inputs of {part.modules[0]}")

    def _diagonals(self, squares: GradientSquares, scale: float, origin: Origin) -> dict[str, Diagonal]:
        found = {}
        for name, parameter in squares.parameters.items():
            if name not in self.parts:
                continue
            total = squares.sums.get(name, torch.zeros_like(parameter))
            if not all_finite(total):
                raise DataError(f"a gradient of {name} holds NaN or infinity: the loss overflows on this data")
            found[name] = Diagonal(values=total * scale, origin=origin)
        return found


def _unreached(part: ParameterPart) -> DataError:
    return DataError(f"no position of {part.modules[0]} has a gradient: the loss does not depend on its output")
