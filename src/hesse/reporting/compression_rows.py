"""Rows of a compression's table of layers; the experts of a mixture share one row per matrix."""

import re
from typing import TYPE_CHECKING, Any

from hesse.reporting.terminal import number

if TYPE_CHECKING:
    from hesse.evaluation.measurements import Measurements
    from hesse.jobs.report import CompressionReport
    from hesse.layerwise.solved_layer import LayerReport

EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.*)")


def layer_rows(report: "CompressionReport", measured: "Measurements", prefix: str) -> list[dict[str, Any]]:
    """Return the cells of each layer that was changed alone, or of one matrix of all experts of a block, by column."""
    by_name = {layer.name: layer for layer in report.layers}
    rows = []
    for group in measured.layers:
        members = [by_name[name] for name in group.layers]
        shapes = dict.fromkeys(f"{layer.shape[0]} × {layer.shape[1]}" for layer in members)
        count = f"{len(members)} of " if len(members) > 1 else ""
        ranks = [layer.rank for layer in members if layer.rank is not None]
        errors = [layer.relative_output_error for layer in members if layer.relative_output_error is not None]
        rows.append(
            {
                "name": group.name.removeprefix(prefix),
                "shape": count + ", ".join(shapes),
                "method": ", ".join(dict.fromkeys(layer.method for layer in members)),
                "bits": _range([layer.bits_per_weight for layer in members], 4),
                "zeros": _range([100 * layer.sparsity for layer in members], 3),
                "rank": _range([float(rank) for rank in ranks], 4),
                "tokens": _whole_range([layer.tokens for layer in members]),
                "damping": _range([layer.damping for layer in members], 3),
                "output_error": _range([100 * error for error in errors], 2),
                "cost": group,
            }
        )
    return rows


def expert_tables(layers: "list[LayerReport]") -> dict[str, Any] | None:
    """Return the experts, rows and most tokens of the table of calibration tokens; None without experts.

    A row is a block and one cell per expert, None if the block lacks it. Matrices with one input have the same tokens.
    """
    seen: dict[str, dict[int, int]] = {}
    for layer in layers:
        found = EXPERT.fullmatch(layer.name)
        if found is not None:
            seen.setdefault(found[1], {}).setdefault(int(found[2]), layer.tokens)
    if not seen:
        return None
    experts = sorted({expert for tokens in seen.values() for expert in tokens})
    rows = [(block, [tokens.get(expert) for expert in experts]) for block, tokens in seen.items()]
    most = max(count for tokens in seen.values() for count in tokens.values())
    return {"experts": experts, "rows": rows, "most": most}


def _range(values: list[float], digits: int) -> str:
    ends = dict.fromkeys(number(value, digits) for value in (min(values), max(values))) if values else ["-"]
    return " to ".join(ends)


def _whole_range(values: list[int]) -> str:
    return " to ".join(dict.fromkeys(f"{value:,}" for value in (min(values), max(values))))
