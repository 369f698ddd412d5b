"""Findings: the measurements of a compression in sentences, each a confirmation or a warning."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hesse.reporting.terminal import number

if TYPE_CHECKING:
    from hesse.evaluation.measurements import Measurements
    from hesse.jobs.report import CompressionReport

MATTERS = 0.02  # share of the cost below which wrong predictions do not matter
ROUTERS = (
    " In a mixture of experts that is usual: the choice of experts is not smooth, and a small change already sends "
    "some tokens to others."
)


@dataclass(frozen=True)
class Finding:
    """A sentence about a compression, with its heading."""

    heading: str
    text: str
    warning: bool


UNKNOWN = Finding("Nothing was predicted.", "No sample that probed the loss reached a compressed layer.", True)


def findings(report: "CompressionReport", measured: "Measurements") -> list[Finding]:
    """Return the findings, most important first."""
    predicted = [_whole(measured), _layers(measured), _line(measured)] if report.loss.predicted else [UNKNOWN]
    return [*predicted, _fit(report, measured), *_notes(report)]


def _whole(measured: "Measurements") -> Finding:
    """Compare the prediction for all layers together with the measurement."""
    whole, band = measured.whole, _band(measured.band)
    text = (
        f"Predicted {number(whole.predicted, 3)}, measured {number(whole.measured.value, 3)} ± "
        f"{number(whole.measured.standard_error, 1)}: measured / predicted is {number(whole.ratio, 3)}"
    )
    if not whole.outside:
        return Finding("The cost is as predicted.", f"{text}, inside the band {band}.", False)
    advice = (
        "The change is too large for a quadratic model, or the text that probed the loss differs from the text that "
        "checked it: trust the measured cost, and do not compare plans by their predictions here."
    )
    return Finding("The cost is not as predicted.", f"{text}, outside of the band {band}. {advice}", True)


def _layers(measured: "Measurements") -> Finding:
    """Compare the predictions for each layer alone with the measurements."""
    known = [group for group in measured.layers if group.predicted is not None]
    outside = sorted((group for group in known if group.outside), key=lambda group: -group.measured.value)
    band, count = _band(measured.layer_band), len(known)
    if not outside:
        return Finding("Each layer costs what was predicted.", f"All {count}, changed alone, are inside {band}.", False)
    named = ", ".join(f"{group.name} ({number(group.ratio, 2)})" for group in outside[:5])
    more = f" and {len(outside) - 5} more" if len(outside) > 5 else ""
    whole = sum(group.measured.value for group in known)
    share = sum(group.measured.value for group in outside) / whole if whole > 0 else 1.0
    text = (
        f"{len(outside)} of {count} layers, changed alone, are outside of the band {band}: {named}{more}. They make up "
        f"{100 * share:.2g} % of the cost of all layers alone"
    )
    if share < MATTERS:
        return Finding("All layers that matter cost what was predicted.", f"{text}, which is little.", False)
    return Finding("Some layers do not cost what was predicted.", f"{text}: give them more bits if it is much.", True)


def _line(measured: "Measurements") -> Finding:
    """Describe the range in which the quadratic model holds."""
    held, first, whole, last = measured.holds_up_to, measured.line[0], measured.whole, measured.line[-1]
    detail = (
        f"measured / predicted is {number(first.ratio, 3)} at {number(first.share)} of the change, which is the error "
        f"of the predicted curvature, and {number(whole.ratio, 3)} at the whole change"
    )
    if held is None:
        return Finding(
            "The quadratic model does not hold, even for small shares of the change.",
            f"M{detail[1:]}.{ROUTERS if any(len(group.layers) > 1 for group in measured.layers) else ''}",
            True,
        )
    if held < 1:
        return Finding(
            "The change made is outside of where the quadratic model holds.",
            f"It breaks down beyond {number(held)} of the change: {detail}.",
            True,
        )
    reach = (
        f"up to {number(held)} times the change, as far as was measured"
        if held == last.share
        else f"and breaks down beyond {number(held)} times the change"
    )
    return Finding(
        "The change made is inside of where the quadratic model holds.", f"It holds {reach}: {detail}.", False
    )


def _fit(report: "CompressionReport", measured: "Measurements") -> Finding:
    """Describe whether calibration overfitted its text."""
    check, seen = measured.check, measured.seen
    if seen is None:
        if report.loss.held_out:
            return Finding("Nothing could be fitted too closely.", "No sample of this text was calibrated on.", False)
        return Finding(
            "Nothing was held out.",
            "The data gave ready samples, and the first of those that were calibrated on also measured the result. "
            "Run hesse evaluate on other text.",
            True,
        )
    new, known = check.divergence, seen.divergence
    difference, error = new.value - known.value, math.hypot(new.standard_error, known.standard_error)
    costs = f"{number(new.value, 3)} on held-out text, {number(known.value, 3)} on calibration text"
    if difference <= 2 * error:
        apart = "the difference is within two of its standard errors" if difference > -2 * error else "that is less"
        return Finding("Calibration is not overfitted.", f"{costs}: {apart}.", False)
    return Finding(
        "Calibration is overfitted, or the held-out text is harder.",
        f"{costs}: {number(difference / error, 2)} standard errors more. Use more --samples, or more damping.",
        True,
    )


def _notes(report: "CompressionReport") -> Iterator[Finding]:
    """Yield a warning if there were departures from the options."""
    count = len(report.notes)
    if count:
        what = "There was one departure" if count == 1 else f"There were {count} departures"
        yield Finding("Not all options were followed.", f"{what}: see the notes below.", True)


def _band(band: tuple[float, float]) -> str:
    return f"{number(band[0], 2)} to {number(band[1], 2)}"
