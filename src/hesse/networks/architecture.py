"""Build transformers' modules from config.json, without weights; code in the model folder is never run."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hesse.checkpoints.checkpoint import Checkpoint, tensor_bytes
from hesse.checkpoints.config_limits import IMPLEMENTATIONS, SPARE
from hesse.errors import CheckpointError, HesseError, UnsupportedModelError, reason
from hesse.networks.experts import unfuse

PARAMETERS_A_TENSOR = 4  # at most: transformers may split one stored tensor
LARGEST_BUFFERS = 1 << 30  # bytes of computed buffers (masks, frequencies) that a model may have beyond its weights
# Settings of config.json that do not describe the architecture: packed weights, code, and implementations.
LEFT_OUT = ("quantization_config", "auto_map", *IMPLEMENTATIONS)


def build(checkpoint: Checkpoint) -> PreTrainedModel:
    """Build the architecture that config.json names, with parameters on the meta device and real computed buffers.

    Fused experts become separate linear layers, as the checkpoint holds them.

    Raises:
        UnsupportedModelError: transformers does not have the architecture, or cannot build it with these settings.
        CheckpointError: config.json asks for far more parameters than the files hold.
    """
    stored = checkpoint.names()
    settings = {key: value for key, value in checkpoint.config.items() if key not in LEFT_OUT}
    place, model_type = f"{checkpoint.folder}/config.json", settings.get("model_type")
    if not model_type or not isinstance(model_type, str):
        raise UnsupportedModelError(f"{place} names no model_type: it is not a transformers model")
    try:
        config = AutoConfig.for_model(**settings)
        factory = find_architecture(checkpoint.folder, settings)
        attention = "sdpa" if factory._supports_sdpa else None
        with _bounded_parameters(checkpoint.folder, len(stored)):
            with torch.device("meta"):
                model: PreTrainedModel = factory._from_config(config, attn_implementation=attention)  # type: ignore[no-untyped-call]
            model.eval()  # type: ignore[no-untyped-call]
            _compute_buffers(model, LARGEST_BUFFERS + checkpoint.stored_bytes)
            unfuse(model, set(stored))
    except HesseError:
        raise
    except Exception as error:  # transformers and torch raise many kinds for settings that make no sense
        raise UnsupportedModelError(f"{place} cannot be used: {reason(error)}") from error
    return model


def find_architecture(folder: Path, config: dict[str, Any]) -> type[PreTrainedModel]:
    """Return the class of transformers that the config of the model in `folder` names.

    Raises:
        UnsupportedModelError: transformers does not have the class.
    """
    names = config.get("architectures") or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(config.get("model_type")))]
    name = names[0] if isinstance(names, list) else None
    factory = getattr(transformers, str(name), None)
    if not (isinstance(factory, type) and issubclass(factory, PreTrainedModel)):
        raise UnsupportedModelError(
            f"{folder}/config.json names the architecture {name}, which transformers {transformers.__version__} does "
            "not have: a newer transformers may"
        )
    return factory


def _compute_buffers(model: PreTrainedModel, most: int) -> None:
    """Compute the buffers that checkpoints do not store; raise if they need more than `most` bytes."""
    computed = {
        module: {name: b for name, b in module._buffers.items() if b is not None and b.is_meta}
        for module in model.modules()
    }
    needed = sum(tensor_bytes(b.shape, b.dtype) for buffers in computed.values() for b in buffers.values())
    if needed > most:
        raise UnsupportedModelError(
            f"{type(model).__name__} as config.json describes it computes buffers of {needed:,} bytes, far more than "
            "its weights: correct its sizes, such as the number of positions"
        )
    owners: dict[nn.Module, PreTrainedModel] = {}  # the innermost model around each module, whose configuration it has
    for inner in model.modules():
        if isinstance(inner, PreTrainedModel):
            owners |= dict.fromkeys(inner.modules(), inner)
    for module, buffers in computed.items():
        for name, buffer in buffers.items():
            module._buffers[name] = torch.empty_like(buffer, device="cpu")
        if buffers:
            owners[module]._init_weights(module)  # type: ignore[no-untyped-call]


@contextmanager
def _bounded_parameters(folder: Path, tensors: int) -> Iterator[None]:
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

    with register_module_parameter_registration_hook(count):  # type: ignore[arg-type]
        yield
