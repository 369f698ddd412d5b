"""Sums over recorded batches, from which curvatures are computed."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hesse.curvature import BlockAccumulator, BlockRankOneSum, Gram, Origin, RankOneSum
from hesse.curvature.symmetric import add_upper, mirror, multiplies_exactly, symmetric_from_upper
from hesse.errors import DataError
from hesse.finite import all_finite
from hesse.passes.parts import ParameterPart
from hesse.passes.recorded_batch import GradientUnit, RecordedBatch, Rows
from hesse.passes.sample_gradients import flat_gradients, sample_gradients
from hesse.processes import ALONE, Processes

Key = tuple[str, ...]  # the modules of a part


@dataclass(eq=False)
class Moment:
    """Σ x xᵀ over rows x, or its diagonal, in float32 at least."""

    total: Tensor  # (n, n), or (n,)
    count: int = 0  # rows
    finished: bool = False

    @classmethod
    def like(cls, rows: Tensor, width: int, diagonal: bool = False) -> "Moment":
        """Return an empty moment for rows of this type and device."""
        dtype = torch.promote_types(rows.dtype if rows.is_floating_point() else torch.float32, torch.float32)
        return cls(torch.zeros((width,) if diagonal else (width, width), dtype=dtype, device=rows.device))

    def add(self, rows: Tensor) -> None:
        """Add rows (k, n), or token ids (k,), which represent unit vectors."""
        self.count += len(rows)
        if rows.ndim == 1:
            self.total += torch.bincount(rows, minlength=len(self.total)).to(self.total)
        elif self.total.ndim == 1:
            self.total += rows.to(self.total).square().sum(0)
        else:
            add_upper(self.total, rows if multiplies_exactly(rows) else rows.to(self.total))

    def all_reduce(self, processes: Processes) -> None:
        """Add up the sums of all processes, in each of them."""
        processes.all_reduce(self.total)
        self.count = processes.all_reduce_sum(self.count)

    def times(self, factor: float, what: str) -> Tensor:
        """Return the sum times `factor`, computed in place: later calls must use the same factor, and add nothing.

        Raises:
            DataError: it is not finite.
        """
        if not self.finished:
            if not all_finite(self.total):
                raise DataError(f"the {what} hold NaN or infinity: the model overflows on this data")
            self.total.mul_(factor)
            if self.total.ndim == 2:
                mirror(self.total)
            self.finished = True
        return self.total

    def mean(self, what: str) -> Tensor:
        """Return the sum divided by the number of rows."""
        return self.times(1 / self.count, what)


class GramAccumulator(Moment):
    """Sum of xxᵀ over a layer's inputs in float32; with reference inputs x₀ also the sum of x x₀ᵀ."""

    def __init__(self, name: str, width: int, device: torch.device) -> None:
        super().__init__(torch.zeros(width, width, device=device))
        self.name = name
        self.cross: Tensor | None = None
        self._wide = self.total[:0]  # inputs in float32; reused, because allocating costs more than the conversion

    def add(self, rows: Tensor, reference: Tensor | None = None) -> None:
        """Add inputs `rows` (..., in), and the same inputs in another stream, always or never.

        Raises:
            DataError: some inputs came with a reference and some without, or of another shape.
        """
        flat = rows.reshape(-1, rows.shape[-1])
        if self.count and (reference is None) != (self.cross is None):
            raise DataError(f"some inputs of {self.name} came with a reference and some without: give it with all")
        if flat.dtype != torch.float32 and not multiplies_exactly(flat):
            if len(self._wide) < len(flat):
                self._wide = torch.empty_like(flat, dtype=torch.float32)
            flat = self._wide[: len(flat)].copy_(flat)
        super().add(flat)
        if reference is not None:
            if reference.shape != rows.shape:
                raise DataError(f"the inputs of {self.name} and their reference differ in shape")
            if self.cross is None:
                self.cross = torch.zeros_like(self.total)
            self.cross.addmm_(flat.T.to(self.cross), reference.reshape(flat.shape).to(self.cross))

    def gram(self, processes: Processes = ALONE) -> Gram:
        """Return the Gram per token of what all `processes` have added; zero if there were no tokens.

        Raises:
            DataError: an input was NaN or infinite.
        """
        self.all_reduce(processes)
        sums = [self.total] if self.cross is None else [self.total, self.cross]
        if not all(all_finite(total) for total in sums):
            raise DataError(
                f"the inputs of {self.name} hold NaN or infinity: the model overflows on this data in its own "
                "precision, or its weights are damaged"
            )
        tokens = max(self.count, 1)
        cross = None if self.cross is None else self.cross / tokens
        return Gram(second_moment=symmetric_from_upper(self.total) / tokens, tokens=self.count, cross_moment=cross)


class InputMoments:
    """Sums of x xᵀ of each matrix's inputs; layers with the same inputs and the same live positions share a moment.

    For token ids, which represent unit vectors, the moment is the diagonal.
    """

    def __init__(self, parts: list[ParameterPart], per: GradientUnit) -> None:
        self.parts = list({part.modules: part for part in parts if part.role == "matrix"}.values())
        self.per = per
        self.sums: dict[Key, Moment] = {}

    def add(self, passage: RecordedBatch) -> None:
        """Add a recorded batch."""
        groups: dict[object, dict[Key, Rows]] = {}
        for part in self.parts:
            rows = passage.rows(part)
            if rows is not None:
                groups.setdefault((rows.source, id(self.sums.get(part.modules))), {})[part.modules] = rows
        for members in groups.values():
            while members:
                first = next(iter(members.values()))
                alike = [key for key, rows in members.items() if torch.equal(rows.live, first.live)]
                self._moment(alike, first).add(first.per(self.per)[0])
                members = {key: rows for key, rows in members.items() if key not in alike}

    def _moment(self, keys: list[Key], rows: Rows) -> Moment:
        """Return the moment that these layers share from now on: a copy if other layers shared it until now."""
        moment = self.sums.get(keys[0])
        if moment is None:
            width = rows.vocabulary or rows.inputs.shape[-1]
            moment = Moment.like(rows.gradients, width, diagonal=rows.vocabulary > 0)
        elif any(other is moment and key not in keys for key, other in self.sums.items()):
            moment = Moment(moment.total.clone(), moment.count)
        self.sums.update(dict.fromkeys(keys, moment))
        return moment


class OutputMoments:
    """Sums of g gᵀ of the gradients at each layer's outputs, or with `diagonal` of g²."""

    def __init__(self, parts: list[ParameterPart], per: GradientUnit, diagonal: bool = False) -> None:
        self.parts = list({part.modules: part for part in parts if part.role != "scale"}.values())
        self.per, self.diagonal = per, diagonal
        self.sums: dict[Key, Moment] = {}

    def add(self, passage: RecordedBatch) -> None:
        """Add a recorded batch."""
        for part in self.parts:
            rows = passage.rows(part)
            if rows is None:
                continue
            gradients = rows.per(self.per)[1]
            if part.modules not in self.sums:
                self.sums[part.modules] = Moment.like(gradients, gradients.shape[1], self.diagonal)
            self.sums[part.modules].add(gradients)


class GradientSquares:
    """Sums of g² of each parameter's gradients of samples or positions, and ‖g‖² of each sample's gradient."""

    def __init__(
        self, parts: dict[str, list[ParameterPart]], parameters: Mapping[str, Tensor], per: GradientUnit
    ) -> None:
        self.parts, self.parameters, self.per = parts, parameters, per
        self.sums: dict[str, Tensor] = {}
        self.norms: dict[str, list[Tensor]] = {name: [] for name in parameters}  # per sample only

    def add(self, passage: RecordedBatch) -> None:
        """Add a recorded batch."""
        for name, parameter in self.parameters.items():
            for square in self._squares(passage, name, parameter):
                self.sums[name] = self.sums[name] + square if name in self.sums else square

    def squared_norms(self) -> dict[str, Tensor]:
        """Return ‖g‖² (samples,) of each sample's gradient of each parameter."""
        return {name: torch.cat(norms) for name, norms in self.norms.items()}

    def _squares(self, passage: RecordedBatch, name: str, parameter: Tensor) -> list[Tensor]:
        """Return sums of squared gradients of one parameter, and record the samples' squared norms."""
        found = [(part, rows) for part in self.parts[name] if (rows := passage.rows(part)) is not None]
        if self.per == "position":
            return [_position_squares(part, rows, parameter) for part, rows in found]
        if len(found) == 1 and found[0][1].gradients.shape[1] == 1 and found[0][0].role == "matrix":
            part, rows = found[0]  # one position a sample: its gradient is a product, and need not be formed
            if not rows.vocabulary:
                sizes = rows.inputs.square().sum((1, 2)) * rows.gradients.square().sum((1, 2))
                self.norms[name].append(sizes)
                return [_position_squares(part, rows, parameter)]
        squares = []
        for gradients in sample_gradients(passage, name, self.parts[name], parameter):
            square = gradients.to(torch.promote_types(gradients.dtype, torch.float32)).square()
            self.norms[name].append(square.flatten(1).sum(1))
            squares.append(square.sum(0))
        if not squares:
            self.norms[name].append(torch.zeros(passage.samples, device=parameter.device))
        return squares


def _position_squares(part: ParameterPart, rows: Rows, parameter: Tensor) -> Tensor:
    """Return the sum over positions of the squared gradient of one part (*shape)."""
    inputs, gradients = rows.inputs.flatten(0, 1), rows.gradients.flatten(0, 1)
    gradients = gradients.to(torch.promote_types(gradients.dtype, torch.float32))
    if part.role == "offset":
        return gradients.square().sum(0).view(parameter.shape)
    if part.role == "scale":
        return (inputs * gradients).square().sum(0).view(parameter.shape)
    if inputs.ndim == 1:
        return gradients.new_zeros(parameter.shape).index_add_(0, inputs, gradients.square())
    sides = (inputs.to(gradients).square(), gradients.square())
    square = sides[0].T @ sides[1] if part.transposed else sides[1].T @ sides[0]
    return square.view(parameter.shape)


class GradientBlocks:
    """Diagonal blocks of the sum of g gᵀ over samples, for each parameter."""

    def __init__(
        self, parts: dict[str, list[ParameterPart]], parameters: Mapping[str, Tensor], block_size: int
    ) -> None:
        self.parts, self.parameters = parts, parameters
        self.sums = {
            name: BlockAccumulator(
                parameter.shape, block_size, torch.promote_types(parameter.dtype, torch.float32), parameter.device
            )
            for name, parameter in parameters.items()
        }

    def add(self, passage: RecordedBatch) -> None:
        """Add a recorded batch."""
        for name, parameter in self.parameters.items():
            for gradients in sample_gradients(passage, name, self.parts[name], parameter):
                self.sums[name].add(gradients)

    def curvatures(self, scale: float, origin: Origin) -> dict[str, BlockRankOneSum]:
        """Return the blocks of `scale` Σ g gᵀ."""
        return {
            name: BlockRankOneSum(matrices=sums.total * scale, weight_shape=tuple(sums.shape), origin=origin)
            for name, sums in self.sums.items()
        }


class FlatGradients:
    """Gradients of all samples as flat vectors over all parameters; `rows` are (samples, parameters)."""

    def __init__(self, parts: dict[str, list[ParameterPart]], parameters: Mapping[str, Tensor]) -> None:
        self.parts, self.parameters = parts, parameters
        self.rows: list[Tensor] = []

    def add(self, passage: RecordedBatch) -> None:
        """Add a recorded batch."""
        self.rows.append(flat_gradients(passage, self.parts, self.parameters))

    def curvature(self, scale: float, origin: Origin) -> RankOneSum:
        """Return `scale` Σ g gᵀ."""
        gradients = torch.cat(self.rows)
        return RankOneSum.from_gradients(gradients * (scale * len(gradients)) ** 0.5, origin)
