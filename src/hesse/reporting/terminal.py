"""Tables in the terminal."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from hesse.errors import printable
from hesse.methods import Method
from hesse.result import REPORT_FILE

if TYPE_CHECKING:  # these need transformers, which takes seconds that `hesse --help` does not have
    from hesse.evaluation import EvaluationReport
    from hesse.jobs.report import CompressionReport


def shown(text: str, style: str = "") -> Text:
    """Return text, which may come from a model or a file name, as rich shows it without interpreting markup."""
    return Text(printable(text), style=style)


def unwrapped(text: str, style: str = "") -> Text:
    """Return text for one line, however long: a command or a path to copy."""
    return Text(printable(text), style=style, no_wrap=True, overflow="ignore")


def number(value: float | None, digits: int = 4) -> str:
    """Return a number with `digits` significant digits, or a dash for None."""
    return "-" if value is None else f"{value:.{digits}g}"


def size(count: int) -> str:
    """Return a number of bytes with a unit."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count} B"


def cost_table(
    report: "CompressionReport", before: "EvaluationReport | None", after: "EvaluationReport | None"
) -> Table:
    """Return the table of a compression, dense and compressed; evaluations add measurements on other text."""
    table = Table(
        "",
        Column("dense", justify="right"),
        Column("compressed", justify="right"),
        box=box.SIMPLE_HEAD,
        title=shown(f"{report.model} by {report.method}"),
        title_justify="left",
    )
    table.add_row("method", "-", shown(report.layers[0].method if report.layers else report.method))
    table.add_row("bytes", f"{report.bytes_before:,}", f"{report.bytes_after:,}")
    table.add_row("bits per weight, compressed layers", "-", number(report.bits_per_weight))
    table.add_row(
        "bits per weight, whole model",
        "-" if before is None else number(before.bits_per_weight),
        number(report.bits_per_weight_model),
    )
    table.add_row("seconds", "-", f"{report.seconds['total']:.1f}")
    table.add_row("peak memory", "-", size(report.peak_rss_bytes))
    for row in _quality_rows(before, after):
        table.add_row(*row)
    loss = report.loss
    table.add_section()
    table.add_row("loss increase predicted, nats per token", "-", number(loss.predicted))
    where = "held-out" if loss.held_out else "calibration"
    measured = number(loss.measured) + ("" if loss.standard_error is None else f" ± {loss.standard_error:.1g}")
    table.add_row(shown(f"{loss.name}, {loss.samples} {where} samples"), "-", measured)
    if after is not None and after.loss_increase is not None:
        table.add_row("loss increase measured on the evaluation text", "-", number(after.loss_increase))
    return table


def _quality_rows(before: "EvaluationReport | None", after: "EvaluationReport | None") -> list[tuple[str, str, str]]:
    if before is None or after is None:
        return []
    rows = [
        ("loss, nats per token", number(before.model_loss, 5), number(after.model_loss, 5)),
        ("perplexity", number(before.perplexity, 5), number(after.perplexity, 5)),
        ("KL(dense || compressed), nats per token", "0", number(after.kl)),
    ]
    if after.top1_agreement is not None:
        rows.append(("top-1 agreement", "100 %", f"{100 * after.top1_agreement:.2f} %"))
    if after.top5_agreement is not None:
        rows.append(("top-5 agreement", "100 %", f"{100 * after.top5_agreement:.2f} %"))
    return rows


def compression_summary(report: "CompressionReport") -> RenderableType:
    """Return the summary of a compression: the table of costs, departures from the recipe, and the costliest layers."""
    parts: list[RenderableType] = [cost_table(report, None, None)]
    parts += note_lines(report.notes, REPORT_FILE)
    worst = sorted(report.layers, key=lambda layer: -(layer.predicted_loss_increase or 0))[:3]
    names = ", ".join(f"{layer.name} ({number(layer.predicted_loss_increase, 2)})" for layer in worst)
    parts.append(shown(f"most of the predicted increase: {names}"))
    seconds = ", ".join(f"{phase} {value:.1f}" for phase, value in report.seconds.items() if phase != "total")
    parts.append(Text(f"seconds: {seconds}"))
    parts.append(Text(f"read back: {report.tensors_equal} tensors equal what was solved or copied"))
    parts.append(unwrapped(f"written to {report.out}", "bold"))
    return Group(*parts)


def note_lines(notes: list[str], file: str) -> list[Text]:
    """Return the first notes, such as departures from the options; all of them are in the report `file`."""
    if not notes:
        return []
    lines = [
        Text(f"{len(notes)} {'note' if len(notes) == 1 else 'notes'}:", style="bold yellow"),
        *(shown(f"  {note}") for note in notes[:20]),
    ]
    return lines if len(notes) <= 20 else [*lines, Text(f"  and {len(notes) - 20} more in {file}")]


def evaluation_summary(evaluation: "EvaluationReport") -> RenderableType:
    """Return the table of an evaluation, the scores of tasks, and notes."""
    parts: list[RenderableType] = [_evaluation_table(evaluation)]
    if evaluation.tasks:
        columns = ("task", "metric", "documents", "value", "standard error", "reference")
        table = Table(
            *(Column(name, justify="right" if name in columns[2:] else "left") for name in columns), box=box.SIMPLE_HEAD
        )
        for score in evaluation.tasks:
            values = (number(value) for value in (score.value, score.standard_error, score.reference))
            count = "-" if score.samples is None else str(score.samples)
            table.add_row(shown(score.task), shown(score.metric), count, *values)
        parts.append(table)
    parts += note_lines(evaluation.notes, "the JSON report (--json)")
    return Group(*parts)


def _evaluation_table(evaluation: "EvaluationReport") -> Table:
    columns, title = ("", Column(justify="right")), shown(evaluation.model)
    table = Table(*columns, box=box.SIMPLE_HEAD, title=title, title_justify="left", show_header=False)
    rows = (
        ("text", "-" if evaluation.standard is None else f"{evaluation.standard}, as papers print it"),
        ("samples", f"{evaluation.samples} of {evaluation.length} tokens"),
        ("tokens", f"{evaluation.tokens:,}"),
        ("loss, nats per token", number(evaluation.model_loss, 5)),
        ("perplexity", number(evaluation.perplexity, 5)),
        ("reference's loss, nats per token", number(evaluation.reference_loss, 5)),
        ("loss increase, nats per token", number(evaluation.loss_increase)),
        ("KL(reference || model), nats per token", number(evaluation.kl)),
        ("  its standard error", number(evaluation.kl_standard_error, 2)),
        ("top-1 agreement", number(evaluation.top1_agreement)),
        ("top-5 agreement", number(evaluation.top5_agreement)),
        ("hidden states: half squared error per token", number(evaluation.hidden_error)),
        ("hidden states: relative squared error", number(evaluation.hidden_relative_error)),
        ("hidden states: cosine", number(evaluation.hidden_cosine, 5)),
        ("bytes", f"{evaluation.bytes:,}"),
        ("bits per weight, whole model", number(evaluation.bits_per_weight)),
    )
    for label, value in rows:
        if value != "-":
            table.add_row(label, value)
    return table


def methods_table(families: Mapping[str, Sequence[Method]]) -> Table:
    """Return the table of methods as triples by family, each with its source and needs."""
    triple = "curvature × constraint × solver"
    columns = Column("method", no_wrap=True), triple
    table = Table(*columns, box=box.SIMPLE_HEAD, title=f"method = {triple}", title_justify="left")
    for family, methods in families.items():
        table.add_section()
        table.add_row(f"[bold]{family}[/bold]")
        for method in methods:
            table.add_row(method.name, _triple(method))
    return table


def options_table(method: Method) -> Table:
    """Return the table of a method's options, with defaults and help."""
    columns = Column("option", no_wrap=True), Column("default", no_wrap=True), ""
    table = Table(*columns, box=box.SIMPLE_HEAD, title=f"options of {method.name}", title_justify="left")
    for option in method.options():
        table.add_row(escape(option.name), escape(option.default_text), escape(option.help))
    return table


def _triple(method: Method) -> str:
    run = "" if method.verb == "compress" else f"; {escape(method.example)}"
    before = "" if method.rewrite is None else f"{method.rewrite}, then "
    below = f"[dim]{escape(method.source)}; needs {escape(method.needs)}{run}[/dim]"
    return f"{before}{' × '.join(method.triple)}\n{below}"
