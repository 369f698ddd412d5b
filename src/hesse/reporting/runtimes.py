"""Exports and benchmarks in the terminal."""

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Column
from rich.text import Text

from hesse.reporting.terminal import number, shown, size, text_table, unwrapped

if TYPE_CHECKING:  # these need transformers, which takes seconds that `hesse --help` does not have
    from hesse.runtimes.benchmark_result import Benchmark, BenchmarkRow, TimedRun
    from hesse.runtimes.export_report import ExportReport


def export_summary(report: "ExportReport") -> RenderableType:
    """Return the summary of an export: storage types, differences from the checkpoint, and the output."""
    kinds = [(stored, count, _grids(report, stored)) for stored, count in report.stored.items()]
    kinds += [(stored, count, "not quantised") for stored, count in report.dense.items()]
    rows = [(shown(stored), str(count), shown(grids)) for stored, count, grids in kinds]
    columns = "stored as", Column("layers", justify="right"), "were"
    exact = f"codes and scales carried over exactly: {report.exact_layers} of {len(report.layers)} layers"
    return Group(
        text_table(shown(f"{report.model} to {report.target}"), *columns, rows=rows),
        *([Text(exact)] if report.layers else []),
        *(shown(note, "yellow") for note in report.notes),
        Text(f"read back: {report.tensors_checked} tensors equal what was to be written"),
        Text(f"bytes: {report.bytes_after:,}, and {report.bytes_before:,} in the checkpoint"),
        unwrapped(f"written to {report.out}", "bold"),
    )


def _grids(report: "ExportReport", stored: str) -> str:
    return ", ".join(dict.fromkeys(layer.grid for layer in report.layers if layer.stored == stored))


def benchmark_summary(result: "Benchmark") -> RenderableType:
    """Return the summary of a benchmark: measurements, ratios, and missing runs."""
    title = f"{result.model} on {result.processor}, {result.threads} of {result.processors} processors"
    numbers = ("on disk", "load, s", "prompt, tokens/s", "decode, tokens/s", "× dense", "peak memory", "KL")
    table = text_table(
        shown(title),
        *(Column(heading, overflow="fold") for heading in ("runtime", "model", "stored as")),
        *(Column(heading, justify="right") for heading in numbers),
        rows=[_cells(result, row) for row in result.rows],
    )
    basis = (
        f"{result.prompt} tokens of prompt, {result.generate} decoded one by one; medians of {result.repeats} "
        "processes, ± half of their range. KL: from the same checkpoint in transformers, nats per token."
    )
    parts: list[RenderableType] = [table, Text(basis)]
    if result.load_average is not None and result.load_average > 0.5:
        busy = f"The machine was busy: its load was {result.load_average:.1f} at the start."
        parts.append(Text(busy, style="bold yellow"))
    return Group(*parts, *(shown(f"{entry.runtime}: {entry.reason}", "yellow") for entry in result.missing))


def _cells(result: "Benchmark", row: "BenchmarkRow") -> "list[str | Text]":
    ratio = result.speed_up(row.runtime) if row.model == "compressed" else None
    return [
        *(shown(text) for text in (row.runtime, row.model, row.stored)),
        size(row.bytes),
        number(row.load_seconds.median, 3),
        _with_spread(row.prefill),
        _with_spread(row.decode),
        number(ratio, 3),
        size(int(row.peak_memory.median)),
        number(row.kl, 2),
    ]


def _with_spread(measured: "TimedRun") -> str:
    return f"{measured.median:.4g} ± {(measured.highest - measured.lowest) / 2:.2g}"
