"""A sum of rank-one matrices of which only blocks on the diagonal are kept (WoodFisher, oBERT)."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from typing_extensions import Self

from hesse.curvature.base import Curvature
from hesse.errors import ConditioningError, DataError, OptionError


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockRankOneSum(Curvature):
    """The blocks of `block_size` neighbouring weights on the diagonal of (1/m) Σ gᵢgᵢᵀ, all worked on at once.

    The last block may be smaller. Blocks wider than the number of gradients are kept as gradients and inverted by their
    m × m inner products, others as matrices; memory is d · min(block_size, 2 m).
    Units and sources: see RankOneSum; blocks: oBERT (Kurtic et al., 2022).
    """

    gradients: Tensor  # (m, *shape)
    block_size: int

    @classmethod
    def from_gradients(cls, gradients: Tensor, block_size: int) -> Self:
        """The blocks for `gradients` (m, *shape), one a sample.

        Raises:
            DataError: there is none, or one is not finite.
            OptionError: `block_size` is below 1.
        """
        if block_size < 1:
            raise OptionError(f"the block size is {block_size}: use 1 or more, such as 50")
        if gradients.ndim < 2 or gradients.shape[0] == 0:
            raise DataError(f"gradients must be (m, ...) with m of 1 or more, not {tuple(gradients.shape)}")
        if not bool(torch.isfinite(gradients).all()):
            raise DataError("the gradients hold NaN or infinity")
        return cls(gradients=gradients, block_size=min(block_size, gradients[0].numel()))

    @property
    def shape(self) -> torch.Size:
        return self.gradients.shape[1:]

    def _blocks(self, rows: Tensor) -> Tensor:
        """`rows` (k, *shape) as (blocks, k, block_size), the last block filled up with zeros."""
        flat = rows.reshape(len(rows), -1)
        missing = -flat.shape[1] % self.block_size
        return torch.nn.functional.pad(flat, (0, missing)).view(len(rows), -1, self.block_size).transpose(0, 1)

    def _joined(self, blocks: Tensor, like: Tensor) -> Tensor:
        """(blocks, k, block_size) as `like` (..., *shape)."""
        flat = blocks.transpose(0, 1).reshape(blocks.shape[1], -1)[:, : self.shape.numel()]
        return flat.reshape(like.shape).to(like.dtype)

    @property
    def _wide(self) -> bool:
        """Whether blocks have more weights than there are gradients."""
        return self.block_size > len(self.gradients)

    @cached_property
    def _grouped(self) -> Tensor:
        """The gradients by block (blocks, m, block_size)."""
        return self._blocks(self.gradients).contiguous()

    @cached_property
    def matrices(self) -> Tensor:
        """The blocks of H themselves (blocks, block_size, block_size), without damping."""
        grouped = self._blocks(self.gradients)
        return grouped.transpose(1, 2) @ grouped / len(self.gradients)

    @cached_property
    def _factor(self) -> Tensor:
        """Cholesky factors: of the blocks of H + λI, or where they are wide of λI + gradients' inner products / m."""
        if self._wide and self.damping == 0:
            raise self._singular()
        square = self._grouped @ self._grouped.transpose(1, 2) / len(self.gradients) if self._wide else self.matrices
        shifted = square + self.damping * torch.eye(square.shape[-1]).to(square)
        if not self._wide:
            filled = self.shape.numel() % self.block_size or self.block_size
            shifted[-1].diagonal()[filled:] = 1  # what the last block was filled up with
        factor, failed = torch.linalg.cholesky_ex(shifted)
        undetermined = self.damping == 0 and self.rank() < self.shape.numel()
        if undetermined or bool((failed != 0).any()):
            raise self._singular()
        lower: Tensor = factor
        return lower

    def _singular(self) -> ConditioningError:
        return ConditioningError(
            f"blocks of {self.block_size} weights of {len(self.gradients)} gradients are singular at damping "
            f"{self.damping:.3g}: use more damping (.damped(0.01)) or more gradients"
        )

    def matvec(self, vector: Tensor) -> Tensor:
        blocks = self._blocks(self._flat(vector))
        if self._wide:
            return self._joined(blocks @ self._grouped.transpose(1, 2) @ self._grouped / len(self.gradients), vector)
        return self._joined(blocks @ self.matrices, vector)

    def solve(self, vector: Tensor) -> Tensor:
        blocks = self._blocks(self._flat(vector))
        if self._wide:
            core = torch.cholesky_solve(self._grouped @ blocks.transpose(1, 2), self._factor).transpose(1, 2)
            return self._joined((blocks - core @ self._grouped / len(self.gradients)) / self.damping, vector)
        return self._joined(torch.cholesky_solve(blocks.transpose(1, 2), self._factor).transpose(1, 2), vector)

    def _flat(self, vector: Tensor) -> Tensor:
        return vector.to(self.gradients.dtype).reshape(-1, *self.shape)

    def inverse_blocks(self) -> Tensor:
        """The blocks of (H + λI)⁻¹ (blocks, block_size, block_size), as greedy pruning of weights needs them."""
        identity = torch.eye(self.block_size).to(self.gradients)
        if self._wide:
            half = torch.linalg.solve_triangular(self._factor, self._grouped, upper=False)
            wide: Tensor = (identity - half.transpose(1, 2) @ half / len(self.gradients)) / self.damping
            return wide
        inverses: Tensor = torch.cholesky_inverse(self._factor)
        return inverses

    def diagonal(self) -> Tensor:
        return self.gradients.double().square().mean(0).to(self.gradients.dtype)

    def inverse_diagonal(self) -> Tensor:
        diagonals = self.inverse_blocks().diagonal(dim1=1, dim2=2)
        return self._joined(diagonals[:, None], self.gradients[:1])[0]

    def rank(self) -> int:
        square = self._grouped @ self._grouped.transpose(1, 2) if self._wide else self.matrices
        return int(torch.linalg.matrix_rank(square, hermitian=True).sum())
