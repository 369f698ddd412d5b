"""Summaries of runs in the terminal."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from hesse.jobs.blocks_report import BlocksReport
from hesse.reporting.terminal import note_lines, number, percent, shown, size, text_table, unwrapped
from hesse.result import ForecastReport, LossChange, Report

if TYPE_CHECKING:  # these need transformers, which takes seconds that `hesse --help` does not have
    from hesse.evaluation import EvaluationReport
    from hesse.jobs.estimate import EstimateReport
    from hesse.jobs.prune_hidden import HiddenReport
    from hesse.jobs.push import PushReport
    from hesse.jobs.repair_report import RepairReport
    from hesse.jobs.report import CompressionReport
    from hesse.jobs.rotate import RotationReport


def cost_table(
    report: "CompressionReport", before: "EvaluationReport | None", after: "EvaluationReport | None"
) -> Table:
    """Return the table of a compression, dense and compressed; evaluations add measurements on other text."""
    loss, model_bits = report.loss, "-" if before is None else number(before.bits_per_weight)
    table = text_table(
        shown(f"{report.model} by {report.method}"),
        "",
        Column("dense", justify="right"),
        Column("compressed", justify="right"),
        rows=[
            ("method", "-", shown(report.layers[0].method if report.layers else report.method)),
            ("bytes", f"{report.bytes_before:,}", f"{report.bytes_after:,}"),
            ("linear weights compressed", "-", percent(report.compressed_share)),
            ("bits per weight, compressed layers", "-", number(report.bits_per_weight)),
            ("bits per weight, whole model", model_bits, number(report.bits_per_weight_model)),
            ("seconds", "-", f"{report.seconds['total']:.1f}"),
            ("peak memory", "-", size(report.peak_rss_bytes)),
            *_quality_rows(before, after),
        ],
    )
    table.add_section()
    table.add_row("loss increase predicted, nats per token", "-", number(loss.predicted))
    table.add_row(shown(_measurement(loss)), "-", _measured(loss))
    if after is not None and after.loss_increase is not None:
        table.add_row("loss increase measured on the evaluation text", "-", number(after.loss_increase))
    return table


def _quality_rows(
    before: "EvaluationReport | None", after: "EvaluationReport | None"
) -> Iterator[tuple[str, str, str]]:
    if before is None or after is None:
        return
    yield "loss, nats per token", number(before.model_loss, 5), number(after.model_loss, 5)
    yield "perplexity", number(before.perplexity, 5), number(after.perplexity, 5)
    yield "KL(dense || compressed), nats per token", "0", number(after.kl)
    if after.top1_agreement is not None:
        yield "top-1 agreement", "100 %", f"{100 * after.top1_agreement:.2f} %"
    if after.top5_agreement is not None:
        yield "top-5 agreement", "100 %", f"{100 * after.top5_agreement:.2f} %"


def compression_summary(report: "CompressionReport") -> RenderableType:
    """Return the summary of a compression: the table of costs, departures from the recipe, and the costliest layers."""
    worst = sorted(report.layers, key=lambda layer: -(layer.predicted_loss_increase or 0))[:3]
    names = ", ".join(f"{layer.name} ({number(layer.predicted_loss_increase, 2)})" for layer in worst)
    seconds = ", ".join(f"{phase} {value:.1f}" for phase, value in report.seconds.items() if phase != "total")
    return Group(
        cost_table(report, None, None),
        *note_lines(report.notes),
        shown(f"most of the predicted increase: {names}"),
        Text(f"seconds: {seconds}"),
        Text(f"read back: {report.tensors_equal} tensors equal what was solved or copied"),
        _out_line(report),
    )


def evaluation_summary(evaluation: "EvaluationReport") -> RenderableType:
    """Return the table of an evaluation, the scores of tasks, and notes."""
    parts: list[RenderableType] = [_evaluation_table(evaluation)]
    if evaluation.tasks:
        figures = (Column(name, justify="right") for name in ("documents", "value", "standard error", "reference"))
        rows: list[list[str | Text]] = []
        for score in evaluation.tasks:
            values = (number(value) for value in (score.value, score.standard_error, score.reference))
            count = "-" if score.samples is None else str(score.samples)
            rows.append([shown(score.task), shown(score.metric), count, *values])
        parts.append(text_table("tasks", "task", "metric", *figures, rows=rows))
    return Group(*parts, *(shown(note) for note in evaluation.notes))


def _evaluation_table(evaluation: "EvaluationReport") -> Table:
    text = "-" if evaluation.standard is None else evaluation.standard
    rows = (
        ("text", f"{text}, as papers print it" if evaluation.standard and not evaluation.notes else text),
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
    known = [row for row in rows if row[1] != "-"]
    return text_table(shown(evaluation.model), "", Column(justify="right"), rows=known, show_header=False)


def prune_summary(report: "BlocksReport | HiddenReport") -> RenderableType:
    """Return what was removed from a checkpoint, and what the change saves and costs."""
    after = report.parameters_after or 0
    share, stored = f"{100 * after / (report.parameters_before or 1):.1f} %", f"{report.bytes_after or 0:,}"
    if isinstance(report, BlocksReport):
        removed: RenderableType = _blocks_table(report)
        saved = [
            _loss_line(report, "scored"),
            shown(f"parameters to store: {after:,} ({share}); bytes: {stored}"),
        ]
    else:
        removed = shown(f"{report.width_after} of {report.width_before} hidden units a block")
        saved = [shown(f"{after:,} parameters ({share}), {stored} bytes"), _loss_line(report, "calibration")]
    return Group(removed, *note_lines(report.notes), *saved, _out_line(report))


def _blocks_table(report: BlocksReport) -> Table:
    """Return the table of the blocks in the order of removal."""
    headings = ("block", f"by {report.score}", "loss without it and those above", "made of")
    rows = []
    for drop in report.removed:
        donor = "-" if drop.donor is None else f"{drop.donor}, error {100 * (drop.relative_error or 0):.3g} %"
        rows.append((str(drop.block), number(drop.score), number(drop.measured), donor))
    columns = [Column(heading, justify="right") for heading in headings]
    return text_table(shown(f"{report.model} without blocks"), *columns, rows=rows)


def _loss_line(report: "BlocksReport | HiddenReport", otherwise: str) -> Text:
    """Return the measured loss, on samples that were held out, or on those that are called `otherwise`."""
    loss = report.loss
    if loss is None or loss.measured is None:
        return shown("not measured")
    return shown(f"{_measurement(loss, otherwise)}: {_measured(loss)}")


def push_summary(report: "PushReport") -> RenderableType:
    """Return what was uploaded, and where it is."""
    return Group(
        shown(f"{len(report.files)} files, {size(report.bytes_after or 0)}, to {report.repository}, {report.revision}"),
        unwrapped(report.url, "bold"),
    )


def repair_summary(report: "RepairReport") -> RenderableType:
    """Return the summary of a repair: losses before and after, added bytes, and departures from the options."""
    before, after = report.loss_before, report.loss
    table = text_table(
        shown(f"{report.compressed}, rank {report.rank} added"),
        "",
        Column("before", justify="right"),
        Column("after", justify="right"),
        rows=[
            ("bytes", f"{report.bytes_before:,}", f"{report.bytes_before + report.bytes_added:,}"),
            ("loss increase predicted, nats per token", number(before.predicted), number(after.predicted)),
            (_measurement(after), _measured(before), _measured(after)),
        ],
    )
    load = f'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{report.compressed}"), "{report.out}")'
    return Group(
        table,
        *note_lines(report.notes),
        Text(f"{len(report.layers)} layers repaired in {report.seconds['total']:.1f} s"),
        _out_line(report),
        *([unwrapped(f"It loads in PEFT: {load}")] if report.format == "adapter" else []),
    )


def rotation_summary(report: "RotationReport") -> RenderableType:
    """Return the notes, the measured divergence, and the next step."""
    lines = list(report.notes)
    if report.loss is not None:
        loss = f"{report.loss.name}: {number(report.loss.measured, 3)} nats per token"
        lines.append(f"{loss}, on {report.tokens:,} tokens")
    lines.append(f"{report.bytes_before:,} bytes before, {report.bytes_after:,} after")
    return Group(*map(shown, lines), _out_line(report), unwrapped(f"Next: hesse compress {report.out} OUT"))


def estimate_summary(report: "EstimateReport") -> RenderableType:
    """Return what was estimated, and the command that uses it."""
    kinds = ", ".join(f"{kind} of {len(layers)} layers" for kind, layers in report.curvatures.items())
    command = f"compress {report.model} OUT" if "gram" in report.curvatures else f"inspect {report.model}"
    return Group(
        shown(f"{kinds} from {report.tokens:,} tokens"),
        _out_line(report),
        unwrapped(f"Next: hesse {command} --statistics {report.out}"),
    )


def forecast_summary(report: ForecastReport) -> RenderableType:
    """Return the summary of a dry run: the resources that a run needs, and the basis of the estimates."""
    lines = [
        f"{report.out}: at most {size(report.out_bytes)} of weights, from {size(report.bytes_before or 0)}",
        f"disk: {size(report.disk_bytes)} free while it runs",
        f"memory: at most {size(report.memory_bytes)}, to {report.memory_phase}",
        f"time: about {_duration(report.seconds['total'])}; {report.basis}",
        *report.notes,
        "nothing was written",
    ]
    return Group(*map(shown, lines))


def _duration(seconds: float) -> str:
    """Return seconds as text, in minutes or hours if long."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _measurement(loss: LossChange, otherwise: str = "calibration") -> str:
    """Return what was measured, and on which samples: held-out ones, or those that are called `otherwise`."""
    return f"{loss.name}, {loss.samples} {'held-out' if loss.held_out else otherwise} samples"


def _measured(loss: LossChange) -> str:
    """Return the measured loss increase with its standard error."""
    return number(loss.measured) + ("" if loss.standard_error is None else f" ± {loss.standard_error:.1g}")


def _out_line(report: Report) -> Text:
    return unwrapped(f"written to {report.out}", "bold")
