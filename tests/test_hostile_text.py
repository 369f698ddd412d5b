"""Names and texts that came with a model, as a page and a terminal show them: text, whatever is in them."""

import io
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType

from helpers import CommandLine, compress
from hesse.evaluation import Evaluation, EvaluationReport
from hesse.inspection import SCHEMES, Inspection
from hesse.inspection.layers import LayerInspection
from hesse.jobs.report import CompressionReport
from hesse.reporting import (
    compression_page,
    compression_summary,
    cost_table,
    evaluation_summary,
    inspection_page,
    inspection_summary,
    write_page,
)
from hesse.reporting.runtimes import benchmark_summary, export_summary
from hesse.runtimes.benchmark_result import Benchmark, BenchmarkRow, MissingRun, TimedRun
from hesse.runtimes.export_report import ExportedLayer, ExportReport

FolderOf = Callable[[str], Path]
ON_A_PAGE = (
    "<script>alert(1)</script>\"><img src=x onerror=alert(2)>' onload='alert(3) "
    "</pre></svg></style></title><svg/onload=alert(4)><!-- --><a href=javascript:alert(5)>]]>&lt;b&gt;{{ 7 * 7 }}$x_{$"
)
IN_A_TERMINAL = "\x1b]0;a title\x07\x1b[2J\x9b31m[red][/blue]:smile:\u202ehidden\r\b\x7f\ud800\n"
EVALUATION = EvaluationReport.of(
    Evaluation(
        kind="causal-lm", samples=1, length=2, tokens=2, loss=1.0, parameters=10, bytes=40, bits_per_weight=32.0
    ),
    "m",
    None,
    seconds=1.0,
)


@pytest.fixture(scope="module")
def report(family_folder: FolderOf, tmp_path_factory: pytest.TempPathFactory) -> CompressionReport:
    """A tiny model's compression, measured."""
    return compress(
        family_folder("llama"), tmp_path_factory.mktemp("text") / "out", bits=3, group_size=32, measure=True
    )


@pytest.fixture(scope="module")
def inspection() -> Inspection:
    """One of two layers."""
    costs = {scheme: {"identity": 1.0, "kronecker": 0.1} for scheme in SCHEMES}
    measured = dict.fromkeys(SCHEMES, (0.1, 0.01))
    layers = [LayerInspection(f"model.{i}", (2, 2), (1.0, 0.1), 0.1, costs, measured) for i in range(2)]
    pairs = [(1.0, 0.1)]
    return Inspection(
        verb="inspect",
        model="m",
        samples=1,
        tokens=2,
        parameters=3,
        statistics="c",
        model_loss=1.0,
        gradient_norm=1.0,
        largest_eigenvalues=pairs,
        smallest_eigenvalues=pairs,
        spectrum=pairs,
        trace=(1.0, 0.1),
        layers=layers,
        rank_correlations=costs,
        seconds={"total": 1.0},
    )


def spoilt(value: Any, evil: str) -> Any:
    """`value` with `evil` after each string in it, but for keys and what a recipe checks."""
    if isinstance(value, str):
        return value + evil
    if is_dataclass(value) and not isinstance(value, type):
        kept = ("recipe", "kind", "rank_correlations")
        return replace(
            value, **{f.name: spoilt(getattr(value, f.name), evil) for f in fields(value) if f.name not in kept}
        )
    if isinstance(value, dict):
        return {key: spoilt(entry, evil) for key, entry in value.items()}
    return [spoilt(entry, evil) for entry in value] if isinstance(value, list) else value


class Elements(HTMLParser):
    """The kinds of elements and attributes of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.kinds: set[tuple[str, str]] = set()
        self.words: list[str] = []
        self.feed(page)
        self.close()
        self.text = " ".join(self.words)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.kinds |= {(tag, ""), *((tag, name) for name, _ in attrs)}
        assert tag not in ("script", "img", "a", "iframe", "link")
        for name, value in attrs:
            assert not name.startswith("on")
            assert "alert" not in (value or "")

    def handle_comment(self, data: str) -> None:
        assert "alert" not in data

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_a_compression_page(report: CompressionReport) -> None:
    hostile = spoilt(report, ON_A_PAGE)
    recipe = {**report.recipe, "about": ON_A_PAGE, "ignore": [ON_A_PAGE]}
    plans = [
        {"bytes": 9, "predicted": 0.1, "kind": kind, "label": ON_A_PAGE} for kind in ("uniform", "chosen", ON_A_PAGE)
    ]
    clean = replace(report, front=[{**plan, "label": "", "kind": "uniform"} for plan in plans])
    page = compression_page(replace(hostile, recipe=recipe, front=plans), f"hesse {ON_A_PAGE}")
    found = Elements(page)
    assert found.kinds <= Elements(compression_page(clean)).kinds | {("b", "")}
    assert found.text.count("alert(1)") > 20


def test_an_inspection_page(inspection: Inspection, tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", inspection_page(spoilt(inspection, IN_A_TERMINAL + ON_A_PAGE)))
    found = Elements((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert found.kinds <= Elements(inspection_page(inspection)).kinds
    assert found.text.count("alert(1)") >= 5


def exports() -> ExportReport:
    layer = ExportedLayer("a", "4 bit", "Q4_0", True)
    return ExportReport(
        verb="export",
        model="m",
        out="out",
        target="gguf",
        bytes_before=2,
        bytes_after=1,
        layers=[layer],
        dense={"float32": 1},
        tensors_checked=1,
        notes=["a note"],
    )


def benchmark() -> Benchmark:
    one = TimedRun.of([1.0])
    row = BenchmarkRow("transformers", "dense", "1", "float32", 1, one, one, one, one, None, None)
    return Benchmark(
        verb="benchmark",
        model="m",
        reference="d",
        prompt=8,
        generate=2,
        threads=1,
        repeats=1,
        processor="processor",
        processors=2,
        load_average=0.0,
        rows=[row],
        missing=[MissingRun("torchao", "not installed")],
    )


def test_a_terminal(report: CompressionReport, inspection: Inspection) -> None:
    shown: list[RenderableType] = [
        compression_summary(spoilt(report, IN_A_TERMINAL)),
        cost_table(spoilt(report, IN_A_TERMINAL), EVALUATION, EVALUATION),
        evaluation_summary(spoilt(EVALUATION, IN_A_TERMINAL)),
        inspection_summary(spoilt(inspection, IN_A_TERMINAL)),
        export_summary(spoilt(exports(), IN_A_TERMINAL)),
        benchmark_summary(spoilt(benchmark(), IN_A_TERMINAL)),
    ]
    for content in shown:
        console = Console(file=io.StringIO(), force_terminal=True, width=400, color_system="standard")
        console.print(content)
        text = console.file.getvalue()  # type: ignore[attr-defined]
        text.encode()
        for control in ("\x1b]", "\x1b[2J", "\x9b", "\x07", "\u202e", "\r", "\b", "\x7f"):
            assert control not in text
        assert r"\x1b]0;a title\x07\x1b[2J\x9b31m[red][/blue]:smile:" in " ".join(text.split())


def test_an_error_is_one_line(hesse_command: CommandLine, tmp_path: Path) -> None:
    ran = hesse_command("evaluate", f"{tmp_path}/no{IN_A_TERMINAL[:-2]}such\nmodel")
    assert ran.code == 1
    assert ran.error.startswith("Error: ")
    assert r"\x1b]0;a title\x07\x1b[2J\x9b31m[red][/blue]:smile:\u202ehidden\r" in ran.error
    assert r"such\nmodel is not a folder" in ran.error
