"""What config.json may ask for, checked against the number of tensors in the weights' files."""

import re
from pathlib import Path
from typing import Any

from hesse.errors import CheckpointError

# Settings that count what is built, or listed, one by one.
COUNTS = re.compile(r"(.*_)?(layers|n_layer|blocks|labels|experts|heads|depth)")


SPARE = 10_000  # above the number of tensors: settings that count something else, such as a window's layers


IMPLEMENTATIONS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")


def check_config(folder: Path, config: dict[str, Any], tensors: int) -> None:
    """Refuse a config that asks for absurdly much, or for code from elsewhere; the files hold so many `tensors`.

    Raises:
        CheckpointError: the message names the setting.
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
                f"{folder}/config.json has {key} {_short(value)}, which is code to be fetched from the hub: remove it, "
                "as no code comes with a model"
            )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
