"""Find the folder of a model given as `default`, a path, or an id on the hub."""

import os
import re
from pathlib import Path

from hesse.errors import CheckpointError, reason

DEFAULT = "default"
DEFAULT_FOLDER = Path(__file__).resolve().parent.parent / "data" / "default"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py"]


def locate(model: str | Path) -> Path:
    """Return the folder of `model`, after downloading a hub id.

    Raises:
        CheckpointError: there is no such folder, and no such model on a reachable hub.
    """
    if str(model) == DEFAULT:
        return DEFAULT_FOLDER
    # os.path, because Path raises on an unknown ~user and on a name too long for the file system.
    path = Path(os.path.expanduser(model))
    if os.path.isdir(path):
        return path
    if HUB_ID.fullmatch(str(model)) is None or ".." in str(model):
        raise CheckpointError(
            f"{model} is not a folder; give a model folder, `default`, or a hub id such as owner/name"
        )
    from huggingface_hub import snapshot_download  # imported late: it takes time, and most runs read a folder

    try:
        return Path(snapshot_download(str(model), allow_patterns=PATTERNS))
    except Exception as error:  # the hub client raises many kinds; all mean that the model is not available
        raise CheckpointError(
            f"{model} is not a folder here, and the hub does not provide it: {reason(error)}"
        ) from None
