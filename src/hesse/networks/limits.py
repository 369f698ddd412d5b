"""Check, while a model is built, that config.json does not ask for far more than the weights' files hold."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from hesse.checkpoints.config_limits import SPARE
from hesse.errors import CheckpointError

PARAMETERS_A_TENSOR = 4  # at most: transformers may split one stored tensor


@contextmanager
def bounded_modules(folder: Path, tensors: int) -> Iterator[None]:
    """Limit the parameters of models built inside to what files with `tensors` tensors can fill.

    Raises:
        CheckpointError: a model has more parameters.
    """
    limit, built = PARAMETERS_A_TENSOR * tensors + SPARE, 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Tensor | None:
        nonlocal built
        built += 1
        if built > limit:
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
