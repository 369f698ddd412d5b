"""What config.json may ask for, held against what the weights' files hold before anything is built of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from hesse.checkpoints.config_limits import SPARE
from hesse.errors import CheckpointError

PARAMETERS_A_TENSOR = 4  # at most: where transformers splits what a file holds in one


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
