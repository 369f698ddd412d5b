"""Result of a benchmark."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from hesse.result import Report


@dataclass(frozen=True)
class TimedRun:
    """Median and spread of a number that was measured in several processes."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "TimedRun":
        """Return the median and the spread of `values`."""
        return cls(median(values), min(values), max(values))


@dataclass(frozen=True)
class BenchmarkRow:
    """One model in one runtime."""

    runtime: str
    model: str  # "dense" or "compressed"
    version: str  # of the runtime
    stored: str  # how most of its weights are stored there
    bytes: int  # on disk
    load_seconds: TimedRun
    prefill: TimedRun  # tokens per second
    decode: TimedRun  # tokens per second
    peak_memory: TimedRun  # bytes, of the whole process
    kl: float | None  # mean KL(the checkpoint in transformers || here), nats per token; None without transformers
    top1_agreement: float | None  # share of tokens with the same most likely next token as there


@dataclass(frozen=True)
class MissingRun:
    """A runtime that was not measured, or a model that a runtime could not run."""

    runtime: str
    reason: str  # and what to do


@dataclass(frozen=True, kw_only=True)
class Benchmark(Report):
    """Rows of a benchmark, with the settings and the machine of the measurement."""

    reference: str | None
    prompt: int
    generate: int
    threads: int
    repeats: int
    processor: str
    processors: int
    load_average: float | None  # of the machine at the start: other work distorts the times
    rows: list[BenchmarkRow]
    missing: list[MissingRun]

    def row(self, runtime: str, model: str) -> BenchmarkRow | None:
        """Return the row of a runtime for the model "dense" or "compressed"."""
        return next((row for row in self.rows if (row.runtime, row.model) == (runtime, model)), None)

    def speed_up(self, runtime: str) -> float | None:
        """Return decoded tokens per second, compressed over dense; torchao compares with dense transformers."""
        dense = self.row(runtime, "dense") or (self.row("transformers", "dense") if runtime == "torchao" else None)
        compressed = self.row(runtime, "compressed")
        return None if dense is None or compressed is None else compressed.decode.median / dense.decode.median
