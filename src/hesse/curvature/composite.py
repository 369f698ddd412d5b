"""Curvatures made of curvatures: sums, multiples, and one for each parameter of a network."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hesse.curvature.base import Curvature
from hesse.curvature.origin import common_origin
from hesse.errors import OptionError, UnsupportedProduct


@dataclass(frozen=True, kw_only=True, eq=False)
class Scaled(Curvature):
    """A curvature times a number above 0, with every product of the original; damping is added after.

    Example:
        >>> Scaled(original=Diagonal(values=torch.ones(2)), factor=3.0) @ torch.ones(2)
        tensor([3., 3.])
    """

    original: Curvature
    factor: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.factor) and self.factor > 0):
            raise OptionError(f"a curvature was multiplied by {self.factor}: use a number above 0")
        if self.original.damping:
            raise OptionError("the curvature in a multiple has a damping of its own: damp the multiple")
        if self.origin is None:  # a number that changes the unit changes the origin: then it is stated
            object.__setattr__(self, "origin", self.original.origin)

    @property
    def shape(self) -> torch.Size:
        return self.original.shape

    @property
    def _held(self) -> Tensor:
        return self.original._held

    @cached_property
    def _inner(self) -> Curvature:
        """The original, damped so that the multiple is damped by λ."""
        return self.original.with_damping(self.damping / self.factor)

    def _matvec(self, vector: Tensor) -> Tensor:
        return self.factor * self.original.matvec(vector)

    def diagonal(self) -> Tensor:
        return self.factor * self.original.diagonal()

    def _solve(self, vector: Tensor) -> Tensor:
        return self._inner.solve(vector) / self.factor

    def _power(self, vector: Tensor, exponent: float) -> Tensor:
        return self._inner.power(vector, exponent) * math.pow(self.factor, exponent)

    def inverse_diagonal(self) -> Tensor:
        return self._inner.inverse_diagonal() / self.factor

    def rank(self) -> int:
        return self.original.rank()

    def trace(self) -> float:
        return self.factor * self.original.trace()

    def largest_eigenvalue(self) -> float:
        return self.factor * self.original.largest_eigenvalue()


@dataclass(frozen=True, kw_only=True, eq=False)
class Sum(Curvature):
    """The sum of several curvatures of one parameter. It has no inverse product of its own: use conjugate gradients.

    Example:
        >>> Sum(terms=(Diagonal(values=torch.ones(2)), Diagonal(values=torch.tensor([1.0, 2.0])))) @ torch.ones(2)
        tensor([2., 3.])
    """

    terms: tuple[Curvature, ...]

    def __post_init__(self) -> None:
        if not self.terms:
            raise OptionError("a sum of no curvatures")
        if any(term.damping for term in self.terms):
            raise OptionError("a curvature in a sum has a damping of its own: damp the sum")
        if len({term.shape for term in self.terms}) > 1:
            raise OptionError(f"curvatures of shapes {[tuple(term.shape) for term in self.terms]} cannot be added")
        object.__setattr__(self, "origin", common_origin((term.origin for term in self.terms), "a sum"))

    @property
    def shape(self) -> torch.Size:
        return self.terms[0].shape

    @property
    def _held(self) -> Tensor:
        return self.terms[0]._held

    def _matvec(self, vector: Tensor) -> Tensor:
        return torch.stack([term.matvec(vector) for term in self.terms]).sum(0)

    def diagonal(self) -> Tensor:
        return torch.stack([term.diagonal() for term in self.terms]).sum(0)

    def trace(self) -> float:
        return sum(term.trace() for term in self.terms)

    def _solve(self, vector: Tensor) -> Tensor:
        raise UnsupportedProduct("a Sum has no inverse product of its own: use hesse.solvers.conjugate_gradients")

    def rank(self) -> int:
        return int(torch.linalg.matrix_rank(self.matrix(), hermitian=True))


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockDiagonal(Curvature):
    """One curvature per parameter, on all parameters as one flat vector, in the order of `shapes`.

    `shapes` are the parameters' own, since a block may act on a part of them that repeats (a Gram on each row), or on
    the same entries in another shape (a convolution's weight as a matrix). The damping is added to every block; blocks
    have none of their own, and all have one origin: a block per position and one per sample are refused.

    Example:
        >>> blocks = {"weight": Gram.from_inputs(2 * torch.eye(2)), "bias": Diagonal(values=torch.ones(1))}
        >>> H = BlockDiagonal(blocks=blocks, shapes={"weight": (1, 2), "bias": (1,)})
        >>> H @ torch.ones(3)
        tensor([2., 2., 1.])
    """

    blocks: dict[str, Curvature]
    shapes: dict[str, tuple[int, ...]]

    def __post_init__(self) -> None:
        if not self.blocks or self.blocks.keys() != self.shapes.keys():
            raise OptionError("a BlockDiagonal takes one block and one shape for each parameter")
        for name, block in self.blocks.items():
            shape, inner = tuple(self.shapes[name]), len(block.shape)
            if tuple(block.shape) != shape[len(shape) - inner :] and block.shape.numel() != math.prod(shape):
                raise OptionError(f"{name} of shape {shape} has a block of shape {tuple(block.shape)}")
            if block.damping:
                raise OptionError(f"the block of {name} has a damping of its own: damp the whole")
        origins = (block.origin for block in self.blocks.values())
        object.__setattr__(self, "origin", common_origin(origins, "a BlockDiagonal"))

    @property
    def shape(self) -> torch.Size:
        return torch.Size((sum(math.prod(shape) for shape in self.shapes.values()),))

    @property
    def _held(self) -> Tensor:
        return next(iter(self.blocks.values()))._held

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """Return a flat vector (..., d) as one tensor (..., *shape) a parameter."""
        sizes = [math.prod(shape) for shape in self.shapes.values()]
        pieces = zip(self.shapes.items(), torch.split(vector, sizes, dim=-1), strict=True)
        return {name: piece.reshape(*vector.shape[:-1], *shape) for (name, shape), piece in pieces}

    @cached_property
    def _damped(self) -> dict[str, Curvature]:
        """The blocks with the damping of the whole, kept with what they factorise."""
        return {name: block.with_damping(self.damping) for name, block in self.blocks.items()}

    def _each(
        self, vector: Tensor, product: Callable[[Curvature, Tensor], Tensor], blocks: dict[str, Curvature]
    ) -> Tensor:
        lead = vector.shape[:-1]
        pieces = []
        for name, piece in self.split(vector).items():
            block = blocks[name]
            pieces.append(product(block, piece.reshape(*lead, -1, *block.shape)).reshape(*lead, -1))
        return torch.cat(pieces, dim=-1)

    def _matvec(self, vector: Tensor) -> Tensor:
        return self._each(vector, lambda block, piece: block.matvec(piece), self.blocks)

    def _solve(self, vector: Tensor) -> Tensor:
        return self._each(vector, lambda block, piece: block.solve(piece), self._damped)

    def _power(self, vector: Tensor, exponent: float) -> Tensor:
        return self._each(vector, lambda block, piece: block.power(piece, exponent), self._damped)

    def _spread(self, values: dict[str, Tensor]) -> Tensor:
        return torch.cat([values[name].flatten().repeat(self._repeats(name)) for name in self.shapes])

    def diagonal(self) -> Tensor:
        return self._spread({name: block.diagonal() for name, block in self.blocks.items()})

    def inverse_diagonal(self) -> Tensor:
        return self._spread({name: block.inverse_diagonal() for name, block in self._damped.items()})

    def _repeats(self, name: str) -> int:
        """Return how many times a block repeats within its parameter."""
        return math.prod(self.shapes[name]) // self.blocks[name].shape.numel()

    def rank(self) -> int:
        return sum(self._repeats(name) * block.rank() for name, block in self.blocks.items())

    def trace(self) -> float:
        return sum(self._repeats(name) * block.trace() for name, block in self.blocks.items())

    def largest_eigenvalue(self) -> float:
        return max(block.largest_eigenvalue() for block in self.blocks.values())
