"""The limits of this machine, measured in the same run as everything that is compared with them."""

import platform
import time
from collections.abc import Callable

import torch


def best_of(action: Callable[[], object], repeats: int = 3) -> float:
    """Seconds of the fastest run."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _seconds(action: Callable[[], object], repeats: int = 10) -> float:
    """The fastest of `repeats` runs after one to warm up."""
    action()
    return best_of(action, repeats)


def gemm_rate(dtype: torch.dtype, size: int = 2048) -> float:
    """Peak rate of a square matrix product, in operations per second."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    return 2 * size**3 / _seconds(lambda: a @ b)


def memory_bandwidth(size: int = 1 << 27) -> float:
    """Bytes per second of a copy that fits no cache, counting the read and the write."""
    source, target = torch.ones(size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8)
    return 2 * size / _seconds(lambda: target.copy_(source))


def limits() -> dict[str, float | int | str]:
    """What the machine can do, and what it is."""
    return {
        "processor": torch.cpu.get_capabilities().get("cpu_name", platform.processor()),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gemm_float32": gemm_rate(torch.float32),
        "gemm_bfloat16": gemm_rate(torch.bfloat16),
        "memory_bandwidth": memory_bandwidth(),
    }
