"""Every constraint has the laws: stored exactly, projected once, priced by what is stored, refused by name."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from hesse.constraints import (
    AlongOutputs,
    BlockTable,
    Codebook,
    Constraint,
    EitherSide,
    Grid,
    GridCode,
    GroupBits,
    Grouped,
    LowRank,
    LowRankCode,
    Microscaled,
    MixedCode,
    MixedGrid,
    PlusCode,
    Rotated,
    SalientCode,
    SalientColumns,
    ScaledCode,
    ScaledColumns,
    SideCode,
    SignRankOne,
    SignRankOneCode,
    Sparse,
    SparseCode,
    SparseGrid,
    Table,
    VectorCode,
    VectorCodebook,
)
from hesse.constraints.mixed_grid import Signs
from hesse.errors import UnsupportedProduct
from hesse.testing import ConstraintLaws


def grid_bits(code: GridCode, bits: int) -> float:
    """Codes, scales of 16 bits, and zero points as wide as codes."""
    zeros = 0 if code.scales.zero_point is None else code.scales.zero_point.numel()
    return code.codes.numel() * bits + code.scales.scale.numel() * 16 + zeros * bits


def neighbours(code: GridCode, bits: int) -> Iterator[GridCode]:
    """All codes one up, one down, or one of them so."""
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    for step in (-1, 1):
        yield GridCode((code.codes.int() + step).clamp(low, high).to(torch.int8), code.scales)
        single = code.codes.int().clone()
        single[0, 0] += step
        yield GridCode(single.clamp(low, high).to(torch.int8), code.scales)


class GroupedLaws(ConstraintLaws):
    """Codes are a projection onto the grid of the stored scales; the scales themselves follow the range of a weight."""

    def again(self, constraint: Constraint, code: Any) -> Any:
        assert isinstance(constraint, Grouped)
        return constraint.round(constraint.decode(code), code.scales)

    def rivals(self, constraint: Constraint, code: Any, seed: int) -> Iterator[Any]:
        assert isinstance(constraint, Grouped)
        return neighbours(code, constraint.code_bits)

    def stored_bits(self, code: GridCode) -> float:
        return grid_bits(code, self.build(torch.bfloat16).code_bits)  # type: ignore[attr-defined]


class TestGrid(GroupedLaws):
    def build(self, dtype: torch.dtype) -> Constraint:
        return Grid(4, 8, dtype=dtype)

    def refusals(self) -> Iterator[Callable[[], object]]:
        yield lambda: Grid(1)
        yield lambda: Grid(9)
        yield lambda: Grid(4, 0)
        yield lambda: Grid(4, headroom=3.0)


class TestGridAsymmetric(GroupedLaws):
    def build(self, dtype: torch.dtype) -> Constraint:
        return Grid(3, 10, symmetric=False, dtype=dtype)


class TestGridSigned(TestGrid):
    def build(self, dtype: torch.dtype) -> Constraint:
        return Grid(2, -1, signed=True, headroom=1.0, dtype=dtype)


class TestTable(GroupedLaws):
    def build(self, dtype: torch.dtype) -> Constraint:
        return Table(name="nf4", group_size=8, dtype=dtype)

    def rivals(self, constraint: Constraint, code: Any, seed: int) -> Iterator[Any]:
        inside = GridCode(code.codes.clamp(-7, 6), code.scales)
        yield from neighbours(inside, 4)

    def refusals(self) -> Iterator[Callable[[], object]]:
        yield lambda: Table(name="fp5")


class TestBlockTable(GroupedLaws):
    def build(self, dtype: torch.dtype) -> Constraint:
        return BlockTable("fp8", 8, height=3, dtype=dtype)

    def rivals(self, constraint: Constraint, code: Any, seed: int) -> Iterator[Any]:
        yield from neighbours(GridCode(code.codes.clamp(-127, 123), code.scales), 8)

    def stored_bits(self, code: GridCode) -> float:
        return code.codes.numel() * 8 + code.scales.scale[::3].numel() * 16

    def refusals(self) -> Iterator[Callable[[], object]]:
        yield lambda: BlockTable(height=0)


class TestMicroscaled(GroupedLaws):
    def build(self, dtype: torch.dtype) -> Constraint:
        return Microscaled("fp4", 8, dtype=dtype)

    def rivals(self, constraint: Constraint, code: Any, seed: int) -> Iterator[Any]:
        yield from neighbours(GridCode(code.codes.clamp(-7, 5), code.scales), 4)

    def stored_bits(self, code: GridCode) -> float:
        scale = code.scales.scale
        assert torch.equal(scale.log2().round().exp2(), scale)
        return code.codes.numel() * 4 + scale.numel() * 8


class TestAlongOutputs(GroupedLaws):
    def build(self, dtype: torch.dtype) -> Constraint:
        return AlongOutputs(Grid(4, 4, dtype=dtype), dtype=dtype)

    def stored_bits(self, code: GridCode) -> float:
        return code.codes.numel() * 4 + code.scales.scale[::4].numel() * 16  # held once a weight, stored once a group


class TestSigns(GroupedLaws):
    def build(self, dtype: torch.dtype) -> Constraint:
        return Signs(group_size=8, dtype=dtype)

    def stored_bits(self, code: GridCode) -> float:
        return code.codes.numel() + code.scales.scale.numel() * 16  # the zero point is always -½


class TestGroupBits(GroupedLaws):
    def build(self, dtype: torch.dtype) -> Constraint:
        return GroupBits(Grid(3, 8, dtype=dtype), (2, 3, 4), dtype=dtype)

    def rivals(self, constraint: Constraint, code: Any, seed: int) -> Iterator[Any]:
        return neighbours(GridCode(code.codes.clamp(-2, 1), code.scales), 2)

    def stored_bits(self, code: GridCode) -> float:
        pytest.skip("its bits are those of the MixedGrid that made it")


class TestMixedGrid(ConstraintLaws):
    def build(self, dtype: torch.dtype) -> Constraint:
        return MixedGrid(Grid(3, 4, dtype=dtype), dtype=dtype)

    def again(self, constraint: Constraint, code: MixedCode) -> MixedCode:
        assert isinstance(constraint, MixedGrid)
        bits = constraint.with_bits(code.bits.tolist())
        return MixedCode(bits.round(constraint.decode(code), code.code.scales), code.bits)

    def rivals(self, constraint: Constraint, code: MixedCode, seed: int) -> Iterator[MixedCode]:
        for each in neighbours(GridCode(code.code.codes.clamp(-2, 1), code.code.scales), 2):
            yield MixedCode(each, code.bits)

    def stored_bits(self, code: MixedCode) -> float:
        return grid_bits(code.code, 3) + 2 * len(code.bits)  # as many groups of 4 bits as of 2

    def refusals(self) -> Iterator[Callable[[], object]]:
        yield lambda: MixedGrid(Grid(8))


class TestEitherSide(ConstraintLaws):
    def build(self, dtype: torch.dtype) -> Constraint:
        return EitherSide(Grid(4, 8, dtype=dtype), dtype=dtype)

    def again(self, constraint: Constraint, code: SideCode) -> SideCode:
        assert isinstance(constraint, EitherSide)
        side = constraint.side(code.along_outputs)
        return SideCode(side.round(constraint.decode(code), code.code.scales), code.along_outputs)

    def rivals(self, constraint: Constraint, code: SideCode, seed: int) -> Iterator[SideCode]:
        for each in neighbours(code.code, 4):
            yield SideCode(each, code.along_outputs)

    def stored_bits(self, code: SideCode) -> float:
        return code.code.codes.numel() * 4 + code.code.codes.numel() / 8 * 16 + 1


class TestCodebook(ConstraintLaws):
    def build(self, dtype: torch.dtype) -> Constraint:
        return Codebook(2, dtype=dtype)

    def stored_bits(self, code: Any) -> float:
        return code.codes.numel() * 2 + code.values.numel() * 16

    def refusals(self) -> Iterator[Callable[[], object]]:
        yield lambda: Codebook(9)
        yield lambda: Codebook(5).check(torch.Size(self.shape))


class TestSparse(ConstraintLaws):
    def build(self, dtype: torch.dtype) -> Constraint:
        return Sparse(0.5, dtype=dtype)

    def stored_bits(self, code: SparseCode) -> float:
        return code.mask.numel() + code.values.numel() * 16

    def refusals(self) -> Iterator[Callable[[], object]]:
        yield lambda: Sparse(1.0)
        yield lambda: Sparse(-0.1)
        yield lambda: Sparse(4, 4)
        yield lambda: Sparse(0.5, block=0)
        yield lambda: Sparse(2, 4, block=2)
        yield lambda: Sparse(2, 5).check(torch.Size(self.shape))
        yield lambda: Sparse(0.5, block=7).check(torch.Size(self.shape))
        yield lambda: Sparse(0.5) & Sparse(0.5)  # type: ignore[operator]


class TestSparseByRow(TestSparse):
    def build(self, dtype: torch.dtype) -> Constraint:
        return Sparse(0.25, scope="row", dtype=dtype)


class TestSparseByPattern(TestSparse):
    def build(self, dtype: torch.dtype) -> Constraint:
        return Sparse(2, 4, dtype=dtype)


class TestSparseByBlock(TestSparse):
    def build(self, dtype: torch.dtype) -> Constraint:
        return Sparse(0.5, block=4, dtype=dtype)

    def stored_bits(self, code: SparseCode) -> float:
        return code.mask.numel() / 4 + code.values.numel() * 16


class TestSparseGrid(GroupedLaws):
    def build(self, dtype: torch.dtype) -> Constraint:
        return Sparse(0.5) & Grid(4, 8, dtype=dtype)

    def again(self, constraint: Constraint, code: GridCode) -> GridCode:
        assert isinstance(constraint, SparseGrid)
        return constraint.grid.round(constraint.decode(code), code.scales)

    def rivals(self, constraint: Constraint, code: GridCode, seed: int) -> Iterator[GridCode]:
        for each in neighbours(code, 4):
            yield GridCode(torch.where(code.codes == 0, 0, each.codes), code.scales)  # of the same zeros

    def stored_bits(self, code: GridCode) -> float:
        return grid_bits(code, 4)

    test_other_types_store_the_same_set = None  # the zeros' own type means nothing, and follows


class TestLowRank(ConstraintLaws):
    metrics = (False,)

    def build(self, dtype: torch.dtype) -> Constraint:
        return LowRank(3, dtype=dtype)

    def stored_bits(self, code: LowRankCode) -> float:
        return 16 * (code.left.numel() + code.right.numel())

    def refusals(self) -> Iterator[Callable[[], object]]:
        yield lambda: LowRank(0)
        yield lambda: LowRank(8).check(torch.Size(self.shape))

    def test_a_metric_is_refused_by_name(self) -> None:
        with pytest.raises(UnsupportedProduct, match="LowRank has no weighted nearest member; use WhitenedSVD"):
            LowRank(3).encode(torch.ones(self.shape), torch.ones(self.shape))


class TestPlus(ConstraintLaws):
    repeats = None  # one part after the other: no minimum over both
    metrics = (False,)

    def build(self, dtype: torch.dtype) -> Constraint:
        return Grid(3, 8, dtype=dtype) + LowRank(2, dtype=dtype)

    def rivals(self, constraint: Constraint, code: PlusCode, seed: int) -> Iterator[PlusCode]:
        for scale in (0.5, 0.9, 1.1):
            yield replace(code, correction=LowRankCode(scale * code.correction.left, code.correction.right))

    def stored_bits(self, code: PlusCode) -> float:
        return grid_bits(code.base, 3) + 16 * (code.correction.left.numel() + code.correction.right.numel())

    def refusals(self) -> Iterator[Callable[[], object]]:
        yield lambda: Grid(4) + LowRank(2) + LowRank(2)
        yield lambda: (Grid(4) + LowRank(8)).check(torch.Size(self.shape))


class TestPlusOfExactWeights(ConstraintLaws):
    repeats = None

    def build(self, dtype: torch.dtype) -> Constraint:
        return Codebook(2, dtype=dtype) + Sparse(0.875, dtype=dtype)

    def rivals(self, constraint: Constraint, code: PlusCode, seed: int) -> Iterator[PlusCode]:
        mask = code.correction.mask
        yield replace(code, correction=SparseCode(mask, torch.zeros_like(code.correction.values)))  # the base alone
        yield replace(code, correction=SparseCode(mask, 0.9 * code.correction.values))

    def stored_bits(self, code: PlusCode) -> float:
        values = code.correction.values.numel()
        return 2 * code.base.codes.numel() + 16 * code.base.values.numel() + values * 16 + values * 5  # of 24 columns


class TestRotated(ConstraintLaws):
    metrics = (False,)

    def build(self, dtype: torch.dtype) -> Constraint:
        return Rotated(Grid(4, 8, dtype=dtype), dtype=dtype)

    def again(self, constraint: Constraint, code: GridCode) -> GridCode:
        assert isinstance(constraint, Rotated)
        assert isinstance(constraint.base, Grid)
        return constraint.base.round(constraint.rotate_weight(constraint.decode(code)), code.scales)

    def rivals(self, constraint: Constraint, code: GridCode, seed: int) -> Iterator[GridCode]:
        return neighbours(code, 4)

    def stored_bits(self, code: GridCode) -> float:
        return grid_bits(code, 4)


class TestScaledColumns(ConstraintLaws):
    def build(self, dtype: torch.dtype) -> Constraint:
        return ScaledColumns(Grid(4, 8, dtype=dtype), dtype=dtype)

    def again(self, constraint: Constraint, code: ScaledCode) -> ScaledCode:
        assert isinstance(constraint, ScaledColumns)
        assert isinstance(constraint.base, Grid)
        inside = constraint.base.round(constraint.decode(code) * code.scale, code.base.scales)
        return ScaledCode(inside, code.scale)

    def rivals(self, constraint: Constraint, code: ScaledCode, seed: int) -> Iterator[ScaledCode]:
        for each in neighbours(code.base, 4):
            yield ScaledCode(each, code.scale)

    def stored_bits(self, code: ScaledCode) -> float:
        return grid_bits(code.base, 4) + 16 * code.scale.numel()


class TestSalientColumns(ConstraintLaws):
    repeats = None  # a member's largest columns may be others

    def build(self, dtype: torch.dtype) -> Constraint:
        grid = Grid(4, -1, headroom=0.06, dtype=dtype)
        return SalientColumns(0.25, grid, dtype=dtype)

    def rivals(self, constraint: Constraint, code: SalientCode, seed: int) -> Iterator[SalientCode]:
        for each in neighbours(code.grid, 4):
            yield replace(code, grid=each)
        yield replace(code, rest=replace(code.rest, positive=~code.rest.positive))

    def stored_bits(self, code: SalientCode) -> float:
        rest = code.rest.positive.numel() + 16 * (len(code.rest.rows) + len(code.rest.columns))
        return len(code.salient) + grid_bits(code.grid, 4) + rest

    def refusals(self) -> Iterator[Callable[[], object]]:
        yield lambda: SalientColumns(0.0)
        yield lambda: SalientColumns(grid=Grid(4, symmetric=False))
        yield lambda: SalientColumns(0.01).check(torch.Size(self.shape))


class TestSignRankOne(ConstraintLaws):
    def build(self, dtype: torch.dtype) -> Constraint:
        return SignRankOne(dtype=dtype)

    def rivals(self, constraint: Constraint, code: SignRankOneCode, seed: int) -> Iterator[SignRankOneCode]:
        yield replace(code, positive=~code.positive)
        for scale in (0.9, 1.1):
            yield replace(code, rows=scale * code.rows)
            columns = code.columns.clone()
            columns[0] *= scale
            yield replace(code, columns=columns)

    def stored_bits(self, code: SignRankOneCode) -> float:
        return code.positive.numel() + 16 * (len(code.rows) + len(code.columns))


class TestVectorCodebook(ConstraintLaws):
    def build(self, dtype: torch.dtype) -> Constraint:
        return VectorCodebook(2, 2, dtype=dtype)

    def rivals(self, constraint: Constraint, code: VectorCode, seed: int) -> Iterator[VectorCode]:
        for step in range(1, 4):
            yield replace(code, codes=(code.codes + step) % 16)  # every vector to another entry

    def stored_bits(self, code: VectorCode) -> float:
        return code.codes.numel() * 4 + code.centroids.numel() * 16

    def refusals(self) -> Iterator[Callable[[], object]]:
        yield lambda: VectorCodebook(0)
        yield lambda: VectorCodebook(3, 3, 2)
        yield lambda: VectorCodebook(2, 5).check(torch.Size(self.shape))
        yield lambda: VectorCodebook(2, 4).check(torch.Size(self.shape))


def all_subclasses(kind: type) -> set[type]:
    below = set(kind.__subclasses__())
    return below | {each for child in below for each in all_subclasses(child)}


def test_every_constraint_has_its_laws() -> None:
    laws = [value for name, value in globals().items() if name.startswith("Test")]
    built = {type(each().build(torch.float32)) for each in laws}
    concrete = {kind for kind in all_subclasses(Constraint) if not getattr(kind, "__abstractmethods__", None)}
    assert {kind for kind in concrete if kind.__module__.startswith("hesse.")} - built == set()
