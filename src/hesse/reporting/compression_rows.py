"""Rows of a compression's table of layers; the experts of a mixture share one row per matrix."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hesse.reporting.terminal import number

if TYPE_CHECKING:
    from hesse.evaluation.measurements import LayerMeasurement, Measurements
    from hesse.jobs.report import CompressionReport
    from hesse.layerwise.solved_layer import LayerReport

EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.*)")


@dataclass(frozen=True)
class LayerRow:
    """One layer, or one matrix of all experts of a block."""

    name: str
    shape: str
    method: str
    bits: str
    zeros: str
    rank: str
    tokens: str
    damping: str
    output_error: str
    cost: "LayerMeasurement"


@dataclass(frozen=True)
class ExpertTable:
    """Calibration tokens of each expert of each block: one cell per expert of `experts`, None if a block lacks it."""

    experts: list[int]
    rows: list[tuple[str, list[int | None]]]
    most: int


def layer_rows(report: "CompressionReport", measured: "Measurements", prefix: str) -> list[LayerRow]:
    """Return a row for each layer that was changed alone."""
    by_name = {layer.name: layer for layer in report.layers}
    rows = []
    for group in measured.layers:
        members = [by_name[name] for name in group.layers]
        shapes = dict.fromkeys(f"{layer.shape[0]} × {layer.shape[1]}" for layer in members)
        count = f"{len(members)} of " if len(members) > 1 else ""
        ranks = [layer.rank for layer in members if layer.rank is not None]
        errors = [layer.relative_output_error for layer in members if layer.relative_output_error is not None]
        rows.append(
            LayerRow(
                name=group.name.removeprefix(prefix),
                shape=count + ", ".join(shapes),
                method=", ".join(dict.fromkeys(layer.method for layer in members)),
                bits=_range([layer.bits_per_weight for layer in members], 4),
                zeros=_range([100 * layer.sparsity for layer in members], 3),
                rank=_range([float(rank) for rank in ranks], 4),
                tokens=_whole_range([layer.tokens for layer in members]),
                damping=_range([layer.damping for layer in members], 3),
                output_error=_range([100 * error for error in errors], 2),
                cost=group,
            )
        )
    return rows


def expert_tables(layers: "list[LayerReport]") -> ExpertTable | None:
    """Return the tokens of each expert, or None without experts; matrices with one input have the same tokens."""
    seen: dict[str, dict[int, int]] = {}
    for layer in layers:
        found = EXPERT.fullmatch(layer.name)
        if found is not None:
            seen.setdefault(found[1], {}).setdefault(int(found[2]), layer.tokens)
    if not seen:
        return None
    experts = sorted({expert for tokens in seen.values() for expert in tokens})
    rows = [(block, [tokens.get(expert) for expert in experts]) for block, tokens in seen.items()]
    return ExpertTable(experts, rows, max(count for tokens in seen.values() for count in tokens.values()))


def _range(values: list[float], digits: int) -> str:
    ends = dict.fromkeys(number(value, digits) for value in (min(values), max(values))) if values else ["-"]
    return " to ".join(ends)


def _whole_range(values: list[int]) -> str:
    return " to ".join(dict.fromkeys(f"{value:,}" for value in (min(values), max(values))))
