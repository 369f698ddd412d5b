"""LoRA adapters in PEFT's layout, which transformers and vLLM read: two factors per layer of an unchanged model."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hesse.checkpoints.files import read_json
from hesse.checkpoints.writer import write_tensors, write_text, writing
from hesse.constraints import LowRankCode
from hesse.errors import CheckpointError, OptionError, reason
from hesse.formats.reading import CompressedCheckpoint
from hesse.networks.families import is_expert
from hesse.networks.network import Network

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TASK_TYPES = {"causal-lm": "CAUSAL_LM", "seq2seq-lm": "SEQ_2_SEQ_LM"}  # of PEFT
PREFIX = "base_model.model."  # PEFT puts this before the model's own module names
# Settings under which the update is not a multiple of B A; an adapter with one of them is refused.
UNSUPPORTED_SETTINGS = (
    "use_dora",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "layer_replication",
)


def layer_paths(network: Network) -> dict[str, str]:
    """Map each linear layer's name in the checkpoint to the path of its module in the model."""
    paths = {id(module): path for path, module in network.model.named_modules()}
    return {layer.name: paths[id(layer.module)] for layer in network.layers}


def check_adaptable(layers: Iterable[str]) -> None:
    """Raise OptionError, with the layer's name, if PEFT cannot adapt one of the layers."""
    for name in layers:
        if is_expert(name):
            raise OptionError(
                f"{name}: transformers keeps experts in one tensor, and PEFT adds no factors to a part of it: leave "
                "them out with --ignore '*.experts.*', or use --format dense"
            )


def write_adapter(
    folder: Path,
    network: Network,
    factors: Mapping[str, LowRankCode],
    dtype: Callable[[str], torch.dtype],
    rank: int,
    base: str,
) -> None:
    """Write an adapter folder.

    Args:
        folder: an existing folder.
        network: the network to adapt.
        factors: B (out, rank) and A (rank, in) by layer name.
        dtype: the stored type for a layer's name.
        rank: the rank of all factors.
        base: the base model's path or id, as the user gave it.

    Raises:
        OutputError: the disk is full or cannot be written.
    """
    paths = layer_paths(network)
    tensors: dict[str, Tensor] = {}
    for name, code in factors.items():
        for side, factor in (("A", code.right), ("B", code.left)):
            tensors[f"{PREFIX}{paths[name]}.lora_{side}.weight"] = factor.to("cpu", dtype(name)).contiguous()
    with writing(folder.parent):
        write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": TASK_TYPES.get(network.kind),
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,  # so that B A is added with factor 1
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": _targets(network.model, [paths[name] for name in factors]),
        "fan_in_fan_out": any(isinstance(layer.module, Conv1D) for layer in network.layers),
        "inference_mode": True,
    }
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def _targets(model: nn.Module, paths: list[str]) -> list[str]:
    """Return the adapted modules' names: the last part alone if it selects exactly these modules, else full paths."""
    ends = {path.rpartition(".")[2] for path in paths}
    every = [path for path, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    alone = {path for path in every if path.rpartition(".")[2] in ends} == set(paths)
    return sorted(ends) if alone else sorted(paths)


class AdaptedCheckpoint(CompressedCheckpoint):
    """Checkpoint with a LoRA adapter: `read` adds the product of the adapter's factors to each weight.

    `paths` maps layer names to module paths (see `layer_paths`).

    Raises:
        CheckpointError: the adapter is not a LoRA, is damaged, or does not fit the checkpoint.
    """

    def __init__(self, folder: Path, adapter: Path, paths: Mapping[str, str]) -> None:
        super().__init__(folder)
        config = read_json(adapter / CONFIG)
        rank, alpha = config.get("r"), config.get("lora_alpha")
        unsupported = [key for key in UNSUPPORTED_SETTINGS if config.get(key)]
        if config.get("peft_type") != "LORA" or unsupported:
            what = ", ".join(unsupported) or f"the peft_type {config.get('peft_type')}"
            raise CheckpointError(f"{adapter / CONFIG} has {what}, which Hesse does not read: merge it with PEFT first")
        if not (isinstance(rank, int) and isinstance(alpha, int | float) and rank > 0):
            raise CheckpointError(f"{adapter / CONFIG} lacks the rank r or lora_alpha: copy the folder again")
        try:
            tensors = load_file(adapter / WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{adapter / WEIGHTS} cannot be read: {reason(error)}") from None
        self._scale, self._transposed = alpha / rank, bool(config.get("fan_in_fan_out"))
        self._adapter_bytes = (sum(t.nbytes for t in tensors.values()), (adapter / WEIGHTS).stat().st_size)
        self._factors: dict[str, tuple[Tensor, Tensor]] = {}
        for name, path in paths.items():
            left, right = (tensors.pop(f"{PREFIX}{path}.lora_{side}.weight", None) for side in "BA")
            if left is not None and right is not None:
                self._factors[f"{name}.weight"] = left.float(), right.float()
        if tensors:
            raise CheckpointError(f"{adapter / WEIGHTS} has {next(iter(tensors))}, but {folder} has no such layer")

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        tensors = super().read(names)
        for name in tensors.keys() & self._factors.keys():
            tensors[name] = self._add_factors(name, tensors[name])
        return tensors

    def _add_factors(self, name: str, weight: Tensor) -> Tensor:
        left, right = self._factors[name]
        shape = weight.shape[::-1] if self._transposed else weight.shape
        if left.shape[1:] != right.shape[:1] or (*left.shape[:1], *right.shape[1:]) != shape:
            raise CheckpointError(
                f"{self.folder}: {name} has shape {tuple(weight.shape)}, but its factors have {tuple(left.shape)} "
                f"and {tuple(right.shape)}: the adapter belongs to another model"
            )
        product = self._scale * (left @ right)
        return weight.float() + (product.T if self._transposed else product)

    @property
    def stored_bytes(self) -> int:
        return super().stored_bytes + self._adapter_bytes[0]

    @property
    def file_bytes(self) -> int:
        return super().file_bytes + self._adapter_bytes[1]
