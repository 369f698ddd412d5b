"""The account of a run, from what it planned and what came of it."""

import platform
from pathlib import Path

import compressed_tensors
import torch
import transformers

from hesse.formats import open_checkpoint
from hesse.jobs.block_solver import BlockResult
from hesse.jobs.plan import Plan
from hesse.jobs.report import CompressionReport, Verification
from hesse.planning.budget import BudgetPlan
from hesse.progress import peak_memory


def versions(version: str) -> dict[str, str]:
    """What the result depends on, `version` being Hesse's own."""
    return {
        "hesse": version,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "compressed_tensors": compressed_tensors.__version__,
        "python": platform.python_version(),
    }


def account(
    plan: Plan,
    planned: BudgetPlan | None,
    result: BlockResult,
    verification: Verification,
    seconds: dict[str, float],
    *,
    folder: Path,
    out: Path,
    name: str,
    version: str,
) -> CompressionReport:
    """The report of a run on the model that a person calls `name`, whose files are in `folder` and will be at `out`."""
    after = open_checkpoint(folder)
    weights = sum(layer.shape[0] * layer.shape[1] for layer in result.layers)
    bits = sum(layer.shape[0] * layer.shape[1] * layer.bits_per_weight for layer in result.layers)
    return CompressionReport(
        method=plan.recipe.method,
        model=name,
        out=str(out),
        format=plan.format.name,
        seconds=seconds,
        peak_rss_bytes=peak_memory(),
        bytes_before=plan.original.checkpoint.file_bytes,
        bytes_after=after.file_bytes,
        bits_per_weight=bits / weights,
        bits_per_weight_model=8 * after.stored_bytes / sum(p.numel() for p in plan.dense.model.parameters()),
        predicted_loss_increase=verification.predicted,
        verification=verification,
        calibration={
            "source": plan.samples.source,
            "curvature": None if plan.statistics is None else str(plan.statistics.folder),
            "samples": len(plan.samples.ids),
            "length": plan.length,
            "tokens": sum(len(ids) for ids in plan.samples.ids),
            "seed": plan.calibration.seed,
            "fingerprint": plan.samples.fingerprint(),
        },
        fallbacks=[*([] if planned is None else planned.notes), *plan.notes, *result.notes],
        layers=result.layers,
        recipe=plan.recipe.model_dump(mode="json", exclude_none=True),
        versions=versions(version),
        front=None if planned is None else planned.front,
    )
