"""Random numbers, tolerances and settings that all laws share."""

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-4}
BATCHES = [(), (1,), (5,), (2, 3)]
seeds = st.integers(0, 2**31 - 1)
# Each subclass is an executor of its own; without a database none replays what another found.
laws = settings(max_examples=15, deadline=None, database=None, suppress_health_check=[HealthCheck.differing_executors])
precisions = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def normal(seed: int, *shape: int) -> Tensor:
    """Return standard normal numbers in float64, the same for the same seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
