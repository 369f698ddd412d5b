"""Check the counts in config.json against the number of tensors in the weights' files."""

import re
from pathlib import Path
from typing import Any

from hesse.errors import CheckpointError

# Settings that count modules or entries that are built one by one.
COUNTS = re.compile(r"(.*_)?(layers|n_layer|blocks|labels|experts|heads|depth)")


SPARE = 10_000  # allowed above the number of tensors: some settings count something else


IMPLEMENTATIONS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")


def check_config(folder: Path, config: dict[str, Any], tensors: int) -> None:
    """Refuse a config with absurd counts, or with code from the hub; `tensors` is the number of tensors in the files.

    Raises:
        CheckpointError: a setting is refused; the message names it.
    """
    for key, value in config.items():
        if isinstance(value, dict):
            check_config(folder, value, tensors)
        if COUNTS.fullmatch(key) and isinstance(value, int) and value > tensors + SPARE:
            raise CheckpointError(
                f"{folder}/config.json has {key} {_short(value)}, but the files hold {tensors} tensors: config and "
                "weights do not belong together"
            )
        if key in IMPLEMENTATIONS and "/" in str(value):
            raise CheckpointError(
                f"{folder}/config.json has {key} {_short(value)}, which is code from the hub: remove it, "
                "because Hesse runs no code of a model"
            )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
