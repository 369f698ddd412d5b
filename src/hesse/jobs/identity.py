"""What a run is of, so that another run never goes on with its work."""

import hashlib
import json
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import torch

from hesse.checkpoints.checkpoint import Checkpoint
from hesse.checkpoints.files import file_digest
from hesse.data.selection import Calibration
from hesse.estimation import Statistics
from hesse.estimation.statistics_folder import INDEX_FILE
from hesse.methods.recipe import Recipe
from hesse.planning.budget import BudgetRequest


def identity(
    checkpoint: Checkpoint,
    wanted: Recipe | BudgetRequest,
    calibration: Calibration,
    statistics: Statistics | None,
    settings: dict[str, Any],
    versions: dict[str, str],
) -> dict[str, str]:
    """A fingerprint of each thing that the result depends on, by what a person calls it.

    The model's weights are read whole for it.
    """
    recipe = wanted.to_yaml() if isinstance(wanted, Recipe) else repr(wanted)
    of_statistics = None if statistics is None else file_digest(statistics.folder / INDEX_FILE)
    return {
        "model": _digest(checkpoint.digests),
        "data": _digest([_data(calibration.data), *astuple(replace(calibration, data=None))]),
        "recipe": _digest(recipe),
        "settings": _digest({**settings, "statistics": of_statistics, "threads": torch.get_num_threads()}),
        "versions of Hesse and its libraries": _digest(versions),
    }


def _data(data: str | Path | list[list[int]] | None) -> Any:
    """The data itself where it is here, else its name."""
    if isinstance(data, str | Path) and Path(data).is_file():
        return file_digest(Path(data))
    return data if data is None or isinstance(data, list) else str(data)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
