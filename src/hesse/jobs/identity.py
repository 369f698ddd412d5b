"""Identity of a run: everything that its result depends on, so that no run resumes the work of another."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from hesse.checkpoints.checkpoint import Checkpoint
from hesse.checkpoints.files import file_digest
from hesse.data.selection import Calibration, Data
from hesse.data.sources import data_files
from hesse.version import versions

# The numbers of a calibration by their names in error messages.
CALIBRATION = {field.name: field.name.replace("_", " ") for field in fields(Calibration) if field.name != "data"}


def identity(
    command: str,
    checkpoints: Sequence[Checkpoint],
    calibration: Calibration,
    request: Mapping[str, str],
    settings: Mapping[str, Any],
) -> dict[str, str]:
    """Return a digest of each thing that the result depends on, by its name in error messages.

    `request` maps such names to text. The weights of all checkpoints are read completely.
    """
    return {
        "command": command,
        "model": _digest([checkpoint.digests for checkpoint in checkpoints]),
        "data": _digest(_data(calibration.data)),
        **{name: _digest(getattr(calibration, field)) for field, name in CALIBRATION.items()},
        **{name: _digest(text) for name, text in request.items()},
        "settings": _digest({**settings, "threads": torch.get_num_threads()}),
        "versions of Hesse and its libraries": _digest(versions()),
    }


def _data(data: Data) -> Any:
    """Return the digest of a local file, or the name and the digests of several ones; else the ids or the name."""
    if data is None or not isinstance(data, str | Path):
        return data
    files = [file_digest(path) for path in data_files(data)]
    if Path(data).is_file():
        return files[0]
    return [str(data), *files] if files else str(data)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
