"""Command line, clock, memory and report shared by the runners of the curvature benchmark.

A runner is started as ``python bench/peers/run_curvature_PEER.py --case STEP:PROBLEM --out FILE``. It writes the
tensors that it computed to FILE, for comparison, and prints its account as one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import peak_rss_bytes
from curvature_models import PROBLEMS, QUICK, Problem
from torch import Tensor

PRODUCTS, PROBES = 10, 16


class Meter:
    """Seconds by name, and memory from the moment `begin` is called."""

    def __init__(self, problem: Problem) -> None:
        self.seconds: dict[str, float] = {}
        self.before = 0
        self._problem = problem

    def begin(self) -> None:
        """Warm the network up with one plain gradient, and note the memory that there is before what is measured."""
        inputs, _ = self._problem.batches[0]
        torch.autograd.grad(self._problem.model(inputs).sum(), self._problem.parameters, allow_unused=True)
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far, that of importing, is not of interest
        self.before = _resident()

    def time(self, name: str, step: Callable[[], object], times: int = 1) -> None:
        """Mean seconds of a step."""
        start = time.perf_counter()
        for _ in range(times):
            step()
        self.seconds[name] = (time.perf_counter() - start) / times

    def products(self, name: str, product: Callable[[], object]) -> None:
        """One product to warm up, then the mean of several."""
        product()
        self.time(name, product, PRODUCTS)

    def estimate(self, name: str, estimate: Callable[[int], object]) -> None:
        """An estimate from several random vectors, after one from a single vector to warm up."""
        estimate(1)
        self.time(name, lambda: estimate(PROBES))


Step = Callable[[Problem, Meter, str], dict[str, Tensor]]


def _resident() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not tell the resident memory of a process")


def run(version: str, steps: dict[str, Step]) -> None:
    """Do the step of the command line and report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", required=True, help="STEP:PROBLEM")
    parser.add_argument("--variant", default="", help="a setting of the program, as its runner knows it")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    step, _, problem_name = arguments.case.partition(":")
    problem = (QUICK if arguments.quick else PROBLEMS)[problem_name]()
    meter = Meter(problem)
    tensors = steps[step](problem, meter, arguments.variant)
    account = {"version": version, "seconds": meter.seconds, "before": meter.before, "peak": peak_rss_bytes()}
    torch.save({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, arguments.out)
    sys.stderr.flush()
    print("\n" + json.dumps(account), flush=True)
