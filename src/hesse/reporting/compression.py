"""HTML page of a compression, written for readers who did not run it."""

import math
import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING

from hesse.errors import OptionError
from hesse.methods import Recipe
from hesse.reporting.compression_plots import along_the_change, alternatives, by_layer, scatter
from hesse.reporting.compression_rows import expert_tables, layer_rows
from hesse.reporting.findings import findings
from hesse.reporting.inspection import common_prefix
from hesse.reporting.page import render
from hesse.reporting.plots import svg
from hesse.reporting.terminal import number, percent, size

if TYPE_CHECKING:
    from hesse.evaluation.measurements import MeasuredMean, Measurements, TextMeasurement
    from hesse.jobs.report import CompressionReport

SHIPPED = "default calibration text"


def compression_page(report: "CompressionReport", command: str | None = None) -> str:
    """Return the page of a measured compression; `command` is the command line that ran it.

    Without `command` the page shows an equivalent command line.

    Raises:
        OptionError: the compression was not measured.
    """
    measured = report.measurements
    if measured is None:
        raise OptionError("a report needs measurements: compress with measure=True")
    names = [group.name for group in measured.layers]
    prefix = common_prefix(names) if len(names) > 1 else ""
    return render(
        "compression.html",
        report=report,
        measured=measured,
        unit=unit(measured),
        tiles=list(_tiles(report, measured)),
        facts=list(_facts(report, measured)),
        findings=findings(report, measured),
        texts=list(_texts(measured)),
        mean_with_error=mean_with_error,
        percent=percent,
        prefix=prefix,
        rows=layer_rows(report, measured, prefix),
        methods=list(dict.fromkeys(layer.method for layer in report.layers)),
        ranked=any(layer.rank is not None for layer in report.layers),
        experts=expert_tables(report.layers),
        recipe=Recipe.model_validate(report.recipe).to_yaml(),
        command=command or repeat_command(report),
        typed=command is not None,
        scatter=svg(scatter, (measured, unit(measured)), "the measured cost of each layer alone against the predicted"),
        line=svg(along_the_change, measured, "measured over predicted cost along the change"),
        by_layer=svg(by_layer, (measured, prefix, unit(measured)), "the costliest layers, predicted and measured"),
        front=svg(alternatives, report, "size against predicted cost of what was planned"),
    )


def unit(measured: "Measurements") -> str:
    """Return the unit of costs."""
    return "half squared error per token" if measured.check.dense_loss is None else "nats per token"


def _cost(report: "CompressionReport", measured: "Measurements") -> str:
    """Return the name and unit of the cost."""
    return f"{report.loss.name}, {unit(measured).removeprefix('half squared error ')}"


def mean_with_error(measured: "MeasuredMean") -> str:
    """Return a mean with its standard error, as text."""
    return f"{number(measured.value, 3)} ± {number(measured.standard_error, 1)}"


def repeat_command(report: "CompressionReport") -> str:
    """Return an equivalent command line, from the recipe in a file and the report's record of the data."""
    calibration = report.calibration
    words = ["hesse", "compress", report.model, report.out, "--recipe", "recipe.yaml"]
    if calibration["source"] == "the token ids given":
        words += ["--data", "IDS.jsonl"]
    elif calibration["source"] != SHIPPED:
        words += ["--data", calibration["source"]]
    if calibration["statistics"] is not None:
        words += ["--statistics", calibration["statistics"]]
    else:
        words += ["--samples", str(calibration["samples"]), "--length", str(calibration["length"])]
    words += ["--seed", str(calibration["seed"]), "--format", report.format]
    return shlex.join(words)


def _tiles(report: "CompressionReport", measured: "Measurements") -> Iterator[tuple[str, str]]:
    """Yield the four most important numbers, with their labels."""
    smaller = percent(report.bytes_after / report.bytes_before)
    yield size(report.bytes_after), f"on disk; {smaller} of {size(report.bytes_before)}"
    check = measured.check
    if check.dense_loss is not None and check.compressed_loss is not None and check.top1_agreement is not None:
        change = math.exp(check.compressed_loss - check.dense_loss) - 1
        yield number(_perplexity(check.compressed_loss)), f"perplexity, {100 * change:+.2g} % of the dense model's"
        yield percent(check.top1_agreement), "of tokens have the dense model's likeliest next token"
    yield number(check.divergence.value, 3), _cost(report, measured)


def _facts(report: "CompressionReport", measured: "Measurements") -> Iterator[tuple[str, str, str]]:
    """Yield (label, dense value, compressed value)."""
    check = measured.check
    yield "bytes on disk", f"{report.bytes_before:,}", f"{report.bytes_after:,}"
    yield "bits per weight, compressed layers", "", number(report.bits_per_weight)
    yield "bits per weight, whole model", "", number(report.bits_per_weight_model)
    yield "linear weights compressed", "", percent(report.compressed_share)
    weights = [layer.shape[0] * layer.shape[1] for layer in report.layers]
    zeros = sum(layer.sparsity * count for layer, count in zip(report.layers, weights, strict=True))
    yield "zeros, compressed layers", "", percent(zeros / sum(weights))
    if check.dense_loss is not None and check.compressed_loss is not None and check.top1_agreement is not None:
        yield "loss, nats per token", number(check.dense_loss, 5), number(check.compressed_loss, 5)
        yield "perplexity", number(_perplexity(check.dense_loss), 5), number(_perplexity(check.compressed_loss), 5)
        yield "likeliest next token as the dense model's", "100 %", f"{100 * check.top1_agreement:.2f} %"
    yield _cost(report, measured), "0", mean_with_error(check.divergence)


def _texts(measured: "Measurements") -> Iterator[tuple[str, str, str]]:
    """Yield (label, value on the calibration samples, value on the check samples)."""
    check, seen = measured.check, measured.seen
    if seen is None:
        return
    yield "text", _amount(seen), _amount(check)
    yield f"cost, {unit(measured)}", mean_with_error(seen.divergence), mean_with_error(check.divergence)
    if seen.dense_loss is not None and seen.compressed_loss is not None:
        assert check.dense_loss is not None and check.compressed_loss is not None
        yield "loss of the dense model", number(seen.dense_loss, 5), number(check.dense_loss, 5)
        yield "loss of the compressed model", number(seen.compressed_loss, 5), number(check.compressed_loss, 5)
        increases = (seen.compressed_loss - seen.dense_loss, check.compressed_loss - check.dense_loss)
        yield "loss increase", number(increases[0], 3), number(increases[1], 3)


def _amount(text: "TextMeasurement") -> str:
    return f"{text.samples} samples, {text.tokens:,} tokens"


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))
