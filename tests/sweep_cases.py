"""Weights and constraints that the sweeps over columns are tried on."""

import torch
from torch import Tensor

from hesse.constraints import Constraint, Grid, Sparse


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def whole(seed: int, lowest: int, highest: int, *shape: int) -> Tensor:
    """Whole numbers in float32."""
    return torch.randint(lowest, highest + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


WEIGHTS = {
    "normal": normal(0, 40, 48),
    "ties": whole(1, -15, 15, 40, 48) / 2,
    "zero columns and rows": normal(2, 40, 48) * (torch.arange(48) % 3 > 0) * (torch.arange(40) % 4 > 0)[:, None],
    "huge": normal(3, 40, 48) * 1e30,
    "tiny": normal(4, 40, 48) * 1e-30,
    "one row": normal(5, 1, 48),
    "outliers": normal(6, 40, 48) * normal(7, 40, 48).exp() ** 3,
}
CONSTRAINTS: dict[str, Constraint] = {
    "by row": Grid(4, -1),
    "groups": Grid(3, 16),
    "ragged groups": Grid(3, 20),
    "groups wider than a block": Grid(4, 32),
    "asymmetric": Grid(3, 8, symmetric=False),
    "signed": Grid(2, 16, headroom=1.0, signed=True),
    "bfloat16": Grid(4, 16, dtype=torch.bfloat16, signed=True),
    "8 bits in bfloat16": Grid(8, -1, symmetric=False, dtype=torch.bfloat16),
    "float16": Grid(4, 16, symmetric=False, dtype=torch.float16),
    "sparse": Sparse(0.5),
    "sparse by row": Sparse(0.4, scope="row"),
    "2 of 4": Sparse(2, 4),
    "sparse and grid": Sparse(0.5) & Grid(4, 16),
    "2 of 4 and asymmetric grid": Sparse(2, 4) & Grid(4, 8, symmetric=False, dtype=torch.bfloat16),
}
