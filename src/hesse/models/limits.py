"""What config.json may ask for, held against what the weights' files hold before anything is built of it."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from hesse.errors import CheckpointError

# Settings that count what is built, or listed, one by one.
COUNTS = re.compile(r"(.*_)?(layers|n_layer|blocks|labels|experts|heads|depth)")
SPARE = 10_000  # above the number of tensors: settings that count something else, such as a window's layers
PARAMETERS_A_TENSOR = 4  # at most: where transformers splits what a file holds in one
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


@contextmanager
def bounded_modules(folder: Path, tensors: int) -> Iterator[None]:
    """Refuse, while a model is built, more parameters than files with so many `tensors` can fill.

    Raises:
        CheckpointError: there are more.
    """
    limit, seen = PARAMETERS_A_TENSOR * tensors + SPARE, 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Tensor | None:
        nonlocal seen
        seen += 1
        if seen > limit:
            raise CheckpointError(
                f"{folder}/config.json describes more than {limit} parameters, but the files hold {tensors} tensors: "
                "config and weights do not belong together"
            )
        return None

    hook = register_module_parameter_registration_hook(count)  # type: ignore[arg-type]
    try:
        yield
    finally:
        hook.remove()


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
