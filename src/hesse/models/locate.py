"""From what a person types to a folder: `default`, a path, or the id of a model on the hub."""

from pathlib import Path

from hesse.errors import CheckpointError

DEFAULT = "default"
DEFAULT_FOLDER = Path(__file__).resolve().parent.parent / "data" / "default"
PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py"]


def locate(model: str | Path) -> Path:
    """The folder of `model`.

    Raises:
        CheckpointError: there is no such folder, and no such model on a hub that can be reached.
    """
    if str(model) == DEFAULT:
        return DEFAULT_FOLDER
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or str(model).startswith(".") or str(model).count("/") != 1:
        raise CheckpointError(f"{model} is no folder; give a model folder, `default`, or a hub id such as owner/name")
    from huggingface_hub import snapshot_download  # imported late: it takes time, and most runs read a folder

    try:
        return Path(snapshot_download(str(model), allow_patterns=PATTERNS))
    except Exception as error:  # the hub client raises many kinds; all mean that there is no such model to be had
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{model} is no folder here, and the hub did not give it: {reason}") from None
