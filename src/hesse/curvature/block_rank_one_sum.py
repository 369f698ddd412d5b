"""A sum of rank-one matrices of which only blocks on the diagonal are kept (WoodFisher, oBERT)."""

from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import Tensor
from typing_extensions import Self

from hesse.curvature.base import Curvature
from hesse.errors import ConditioningError, DataError, OptionError
from hesse.finite import all_finite


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockRankOneSum(Curvature):
    """The blocks of neighbouring weights on the diagonal of (1/m) Σ gᵢgᵢᵀ, all processed together.

    The gradients themselves are not kept: memory is d · block_size. The last block is padded with zeros. Blocks as
    large as a whole parameter are better kept as a RankOneSum. Units: see RankOneSum. Source: WoodFisher (Singh and
    Alistarh, 2020), oBERT (Kurtic et al., 2022).

    Example:
        >>> H = BlockRankOneSum.from_gradients(torch.tensor([[1.0, 1.0, 2.0]]), block_size=2)
        >>> H.matrix()
        tensor([[1., 1., 0.],
                [1., 1., 0.],
                [0., 0., 4.]])
    """

    matrices: Tensor  # (blocks, block_size, block_size), the blocks of H
    weight_shape: tuple[int, ...]

    @classmethod
    def from_gradients(cls, gradients: Tensor, block_size: int) -> Self:
        """Return the blocks of `gradients` (m, *shape), one a sample.

        Raises:
            DataError: there is none, or one is not finite.
            OptionError: `block_size` is below 1.
        """
        blocks = BlockAccumulator(gradients.shape[1:], block_size, gradients.dtype, gradients.device)
        blocks.add(gradients)
        curvature = blocks.curvature()
        return cls(matrices=curvature.matrices, weight_shape=curvature.weight_shape)

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.weight_shape)

    @property
    def _held(self) -> Tensor:
        return self.matrices

    @property
    def block_size(self) -> int:
        """The number of weights in a block."""
        return self.matrices.shape[-1]

    def _joined(self, blocks: Tensor, like: Tensor) -> Tensor:
        """Return (blocks, k, block_size) in the shape and type of `like` (..., *shape)."""
        flat = blocks.transpose(0, 1).reshape(blocks.shape[1], -1)[:, : self.shape.numel()]
        return flat.reshape(like.shape).to(like.dtype)

    def _split(self, vector: Tensor) -> Tensor:
        return in_blocks(vector.to(self.matrices.dtype).reshape(-1, self.shape.numel()), self.block_size)

    @cached_property
    def _factor(self) -> Tensor:
        """Lower Cholesky factors of the blocks of H + λI; of 1 where the last block was filled up."""
        shifted = self.matrices + self.damping * torch.eye(self.block_size).to(self.matrices)
        filled = self.shape.numel() % self.block_size or self.block_size
        shifted[-1].diagonal()[filled:] = 1
        factor, failed = torch.linalg.cholesky_ex(shifted)
        undetermined = self.damping == 0 and self.rank() < self.shape.numel()
        if undetermined or bool((failed != 0).any()):
            raise ConditioningError(
                f"blocks of {self.block_size} weights are singular at damping {self.damping:.3g}: use more damping "
                "(.damped(0.01)) or more gradients"
            )
        return cast(Tensor, factor)

    def _matvec(self, vector: Tensor) -> Tensor:
        return self._joined(self._split(vector) @ self.matrices, vector)

    def _solve(self, vector: Tensor) -> Tensor:
        columns = torch.cholesky_solve(self._split(vector).transpose(1, 2), self._factor)
        return self._joined(columns.transpose(1, 2), vector)

    def inverse_blocks(self) -> Tensor:
        """Return the blocks of (H + λI)⁻¹ (blocks, block_size, block_size), as greedy pruning of weights needs them."""
        return torch.cholesky_inverse(self._factor)

    def split(self, vector: Tensor) -> Tensor:
        """Return a tensor of H's shape as (blocks, block_size), the last block padded with zeros."""
        return self._split(vector)[:, 0]

    def join(self, blocks: Tensor) -> Tensor:
        """Undo `split`."""
        return blocks.reshape(-1)[: self.shape.numel()].view(self.shape)

    def _diagonals(self, blocks: Tensor) -> Tensor:
        return self.join(blocks.diagonal(dim1=1, dim2=2))

    def diagonal(self) -> Tensor:
        return self._diagonals(self.matrices)

    def inverse_diagonal(self) -> Tensor:
        return self._diagonals(self.inverse_blocks())

    def rank(self) -> int:
        return int(torch.linalg.matrix_rank(self.matrices, hermitian=True).sum())


class BlockAccumulator:
    """Accumulator of the blocks of gradients; larger batches of gradients are faster."""

    def __init__(
        self,
        shape: torch.Size | tuple[int, ...],
        block_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if block_size < 1:
            raise OptionError(f"the block size is {block_size}: use 1 or more, such as 50")
        self.shape = torch.Size(shape)
        size = min(block_size, self.shape.numel())
        self.total = torch.zeros(-(-self.shape.numel() // size), size, size, dtype=dtype, device=device)
        self.count = 0

    def add(self, gradients: Tensor) -> None:
        """Add `gradients` (m, *shape), one a sample.

        Raises:
            DataError: there is none, one is not finite, or they have another shape.
        """
        if gradients.ndim < 2 or gradients.shape[0] == 0 or gradients.shape[1:] != self.shape:
            expected = ", ".join(("m", *map(str, self.shape)))
            raise DataError(f"gradients must be ({expected}) with m of 1 or more, not {tuple(gradients.shape)}")
        if not all_finite(gradients):
            raise DataError("the gradients hold NaN or infinity")
        grouped = in_blocks(gradients.to(self.total.dtype).reshape(len(gradients), -1), self.total.shape[-1])
        self.total.baddbmm_(grouped.transpose(1, 2), grouped)
        self.count += len(gradients)

    def curvature(self) -> BlockRankOneSum:
        """Return the blocks of the mean over all gradients added so far.

        Raises:
            DataError: there was none.
        """
        if not self.count:
            raise DataError("no gradient was added yet")
        return BlockRankOneSum(matrices=self.total / self.count, weight_shape=tuple(self.shape))


def in_blocks(rows: Tensor, block_size: int) -> Tensor:
    """Return `rows` (k, d) as (blocks, k, block_size), the last block padded with zeros."""
    missing = -rows.shape[1] % block_size
    filled = torch.nn.functional.pad(rows, (0, missing)) if missing else rows  # padding by nothing copies
    return filled.view(len(rows), -1, block_size).transpose(0, 1)
