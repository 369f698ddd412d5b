"""Exports and benchmarks in the terminal."""

from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from hesse.reporting.terminal import number, shown, size, unwrapped

if TYPE_CHECKING:  # these need transformers, which takes seconds that `hesse --help` does not have
    from hesse.runtimes.benchmark_result import Benchmark, BenchmarkRow, TimedRun
    from hesse.runtimes.export_report import ExportReport


def export_summary(report: "ExportReport") -> RenderableType:
    """Return the summary of an export: storage types, differences from the checkpoint, and the output."""
    columns = "stored as", Column("layers", justify="right"), "were"
    title = shown(f"{report.model} to {report.target}")
    table = Table(*columns, box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for stored, count in report.stored.items():
        grids = dict.fromkeys(layer.grid for layer in report.layers if layer.stored == stored)
        table.add_row(shown(stored), str(count), shown(", ".join(grids)))
    for stored, count in report.dense.items():
        table.add_row(shown(stored), str(count), "not quantised")
    exact = f"codes and scales carried over exactly: {report.exact_layers} of {len(report.layers)} layers"
    parts: list[RenderableType] = [table, *([Text(exact)] if report.layers else [])]
    parts += [shown(note, "yellow") for note in report.notes]
    parts.append(Text(f"read back: {report.tensors_checked} tensors equal what was to be written"))
    parts.append(Text(f"bytes: {report.bytes_after:,}, and {report.bytes_before:,} in the checkpoint"))
    parts.append(unwrapped(f"written to {report.out}", "bold"))
    return Group(*parts)


def benchmark_summary(result: "Benchmark") -> RenderableType:
    """Return the summary of a benchmark: measurements, ratios, and missing runs."""
    title = f"{result.model} on {result.processor}, {result.threads} of {result.processors} processors"
    numbers = ("on disk", "load, s", "prompt, tokens/s", "decode, tokens/s", "× dense", "peak memory", "KL")
    table = Table(
        *(Column(heading, overflow="fold") for heading in ("runtime", "model", "stored as")),
        *(Column(heading, justify="right") for heading in numbers),
        box=box.SIMPLE_HEAD,
        title=shown(title),
        title_justify="left",
    )
    for row in result.rows:
        table.add_row(*_cells(result, row))
    parts: list[RenderableType] = [table]
    parts.append(
        Text(
            f"{result.prompt} tokens of prompt, {result.generate} decoded one by one; medians of {result.repeats} "
            "processes, ± half of their range. KL: from the same checkpoint in transformers, nats per token."
        )
    )
    if result.load_average is not None and result.load_average > 0.5:
        parts.append(
            Text(f"The machine was busy: its load was {result.load_average:.1f} at the start.", style="bold yellow")
        )
    parts += [shown(f"{entry.runtime}: {entry.reason}", "yellow") for entry in result.missing]
    return Group(*parts)


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
