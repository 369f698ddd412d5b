"""S = values of a table times one scale for each block of rows and columns: FP8 as DeepSeek-V3 stores it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hesse.constraints.grouped import Scales
from hesse.constraints.table import TABLES, Table
from hesse.errors import OptionError


@dataclass(frozen=True, eq=True)
class BlockTable(Table):
    """The values of a named table, times a scale for every block of `height` rows and `group_size` columns.

    The blocks at the ends may be smaller. A code holds the scale of a block once for each row.

    Source: DeepSeek-V3 (DeepSeek-AI, 2024, arXiv:2412.19437), section 3.3.
    """

    name: str = "fp8"
    group_size: int = 128
    height: int = 128
    rows_are_independent = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.height < 1:
            raise OptionError(f"a block has {self.height} rows; use a positive number such as 128")

    def fit(self, weight: Tensor) -> Scales:
        bottom, top = self.ranges(weight)
        largest = [
            block.amax(0, keepdim=True).expand_as(block)
            for block in torch.split(torch.maximum(top, -bottom), self.height)
        ]
        return Scales(self.stored_scale(torch.cat(largest) / TABLES[self.name][-1]), None)

    def bits_per_weight(self, shape: torch.Size) -> float:
        blocks = -(-shape[0] // self.height) * self.groups(shape[1])
        return self.code_bits + torch.finfo(self.dtype).bits * blocks / shape.numel()
