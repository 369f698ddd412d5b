"""Regular tilings of matrices: single weights, N:M groups, blocks of b neighbours, rows, columns, layers."""

from collections.abc import Mapping

import torch
from torch import Tensor

from hesse.errors import OptionError
from hesse.partitions.partition import Partition, Shapes

KINDS_OF_TILES = {(1, 1): "weights", (1, None): "rows", (None, 1): "columns", (None, None): "layers"}


class Tiles(Partition):
    """Tiles of `tile` (rows, columns) of each parameter; None is the whole side.

    A parameter of more than two dimensions is the matrix (out, all others), a vector is a matrix of one column. Parts
    run through the parameters in order, through each in row-major order of its tiles.

    - `Tiles(shapes)`: single weights.
    - `Tiles(shapes, (1, 4))`: the groups of an N:4 pattern, or blocks of 4 neighbours of a row.
    - `Tiles(shapes, (1, None))`: rows. `Tiles(shapes, (None, 1))`: columns. `Tiles(shapes, (None, None))`: layers.

    Raises:
        OptionError: a matrix does not divide into such tiles.
    """

    def __init__(self, shapes: Shapes, tile: tuple[int | None, int | None] = (1, 1)) -> None:
        self.tile = tile
        self._shapes = {name: torch.Size(shape) for name, shape in shapes.items()}
        for name, shape in self._shapes.items():
            sides = self._matrix(name)
            if any(size % (wanted or size) for size, wanted in zip(sides, tile, strict=True)):
                raise OptionError(f"{name} {tuple(shape)} does not divide into tiles of {tile[0]} × {tile[1]}")

    @property
    def kind(self) -> str:
        return KINDS_OF_TILES.get(self.tile, "tiles")

    @property
    def count(self) -> int:
        return sum(rows * columns for rows, columns in map(self.grid, self._shapes))

    @property
    def shapes(self) -> Shapes:
        return self._shapes

    def grid(self, name: str) -> tuple[int, int]:
        """Return the numbers (rows, columns) of a parameter's tiles."""
        (rows, columns), (height, width) = self._matrix(name), self._tile(name)
        return rows // height, columns // width

    def split(self, costs: Tensor) -> dict[str, Tensor]:
        """Return numbers of all parts (..., parts) as one matrix (..., rows, columns) of tiles for each parameter."""
        grids = {name: self.grid(name) for name in self._shapes}
        pieces = torch.split(costs, [rows * columns for rows, columns in grids.values()], dim=-1)
        return {name: piece.reshape(*costs.shape[:-1], *grids[name]) for name, piece in zip(grids, pieces, strict=True)}

    def sums_of_samples(self, tensors: Mapping[str, Tensor]) -> Tensor:
        first = next(iter(tensors.values()))
        return torch.cat(
            [
                self._sums(name, tensors[name]).flatten(1)
                if name in tensors
                else first.new_zeros(len(first), self.grid(name)[0] * self.grid(name)[1])
                for name in self._shapes
            ],
            dim=1,
        )

    def _sums(self, name: str, tensor: Tensor) -> Tensor:
        """Return the sums of one parameter's (samples, *shape) over its tiles (samples, rows, columns)."""
        matrix = tensor.reshape(len(tensor), *self._matrix(name))
        if self.tile == (1, 1):
            return matrix
        (rows, columns), (height, width) = self.grid(name), self._tile(name)
        return matrix.reshape(-1, rows, height, columns, width).sum((-3, -1))

    def spread(self, values: Tensor, like: Mapping[str, Tensor], other: float = 0.0) -> dict[str, Tensor]:
        result = {}
        for name, own in self.split(values).items():
            height, width = self._tile(name)
            whole = own.to(like[name]).repeat_interleave(height, 0).repeat_interleave(width, 1)
            result[name] = whole.reshape(self._shapes[name])
        return result

    def _matrix(self, name: str) -> tuple[int, int]:
        shape = self._shapes[name]
        return shape[0], shape[1:].numel()

    def _tile(self, name: str) -> tuple[int, int]:
        (rows, columns), (height, width) = self._matrix(name), self.tile
        return height or rows, width or columns
