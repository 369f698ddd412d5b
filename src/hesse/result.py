"""The result of every verb: a report with one schema and, where it was made in memory, a model."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from torch import nn

SCHEMA = 1  # of `Report.to_dict`: raised when a key is renamed, removed or changes its meaning
REPORT_FILE = "hesse-report.json"  # beside the weights, in every folder that a command writes

NOT_WRITTEN = {"written": False}  # metadata of a field that `to_dict` leaves out, such as tensors


@dataclass(frozen=True, kw_only=True)
class LossChange:
    """Loss increase of a changed model: predicted by the quadratic model, and measured."""

    name: str  # of what was measured, such as "KL(dense || compressed)" or "half squared error of hidden states"
    unit: str = "nats per token"
    predicted: float | None = None  # None without a prediction
    measured: float | None = None
    standard_error: float | None = None  # of `measured`
    samples: int | None = None  # that it was measured on
    held_out: bool | None = None  # True if the change was made without these samples


@dataclass(frozen=True, kw_only=True)
class Report:
    """Base of all reports. Sizes are in bytes, times in seconds, losses in nats per token unless `loss.unit` differs.

    A report of a verb adds fields of its own. A field that does not apply is None or empty.
    """

    verb: str  # "compress", "prune", ...: the command and the function
    model: str  # as the user named it, or the class of a module
    method: str | None = None
    out: str | None = None
    bytes_before: int | None = None
    bytes_after: int | None = None
    parameters_before: int | None = None
    parameters_after: int | None = None
    loss: LossChange | None = None
    layers: list[Any] = field(default_factory=list)  # a record for each layer, block or group that was changed
    notes: list[str] = field(default_factory=list)  # departures from the options, and other remarks
    seconds: dict[str, float] = field(default_factory=dict)  # "total", and by phase
    versions: dict[str, str] = field(default_factory=dict)  # of Hesse and of the packages that the result depends on

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values, with the schema's version first."""
        return {"schema": SCHEMA, **_plain(self)}


BASIS = (
    "one block was read, run and calibrated on one batch, and one of its layers of each shape solved; the seconds are "
    "these times as often as the run does so"
)


@dataclass(frozen=True, kw_only=True)
class ForecastReport(Report):
    """Forecast of a run, from timing one block; nothing is written.

    `bytes_after` is the model's size after the run, at most; `seconds["total"]` is how long the run would take.
    """

    out_bytes: int  # of OUT's weights, at most
    disk_bytes: int  # free space that the run needs, OUT included
    memory_bytes: int  # that the process takes, at most
    memory_phase: str  # when it takes the most
    basis: str = BASIS  # how the seconds were estimated


R = TypeVar("R", bound=Report, covariant=True)


@dataclass(frozen=True, eq=False)
class Result(Generic[R]):
    """Result of a verb.

    Attributes:
        report: what was done, and what it cost.
        model: the changed module where the verb was given a module; None where it wrote a checkpoint.
    """

    report: R
    model: nn.Module | None = field(default=None, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return self.report.to_dict()

    def __str__(self) -> str:
        return str(self.report)


def _plain(value: Any) -> Any:
    """Return dataclasses as dictionaries and tuples as lists, in depth."""
    if is_dataclass(value):
        shown = [entry.name for entry in fields(value) if entry.metadata.get("written", True)]
        return {name: _plain(getattr(value, name)) for name in shown}
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value
