"""What a benchmark came to."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True)
class TimedRun:
    """A number that was measured in several processes."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "TimedRun":
        """The median and the spread of `values`."""
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
    prefill: TimedRun  # tokens a second
    decode: TimedRun  # tokens a second
    peak_memory: TimedRun  # bytes, of the whole process
    kl: float | None  # mean KL(the checkpoint in transformers || here), nats per token; None without transformers
    top1_agreement: float | None  # share of tokens with the same most likely next token as there


@dataclass(frozen=True)
class MissingRun:
    """A runtime that was not measured, or a model that it could not run."""

    runtime: str
    reason: str  # and what to do


@dataclass(frozen=True)
class Benchmark:
    """All rows, and what they were measured with."""

    model: str
    reference: str | None
    prompt: int
    generate: int
    threads: int
    repeats: int
    processor: str
    processors: int
    load_average: float | None  # of the machine when the benchmark began: other work spoils it
    versions: dict[str, str]
    rows: list[BenchmarkRow]
    missing: list[MissingRun]

    def row(self, runtime: str, model: str) -> BenchmarkRow | None:
        """The row of a runtime and "dense" or "compressed"."""
        return next((row for row in self.rows if (row.runtime, row.model) == (runtime, model)), None)

    def speed_up(self, runtime: str) -> float | None:
        """Decoded tokens a second, compressed over dense; torchao's dense model is that of transformers."""
        dense = self.row(runtime, "dense") or (self.row("transformers", "dense") if runtime == "torchao" else None)
        compressed = self.row(runtime, "compressed")
        return None if dense is None or compressed is None else compressed.decode.median / dense.decode.median

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)
