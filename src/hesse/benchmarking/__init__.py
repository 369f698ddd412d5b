"""How fast a checkpoint runs on this machine, in each runtime, beside the dense one."""

from hesse.benchmarking.benchmark import benchmark_checkpoint
from hesse.benchmarking.result import Benchmark, Measured, Missing, Row
from hesse.benchmarking.runtimes import RUNTIMES

__all__ = ["RUNTIMES", "Benchmark", "Measured", "Missing", "Row", "benchmark_checkpoint"]
