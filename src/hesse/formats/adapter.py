"""PEFT's LoRA folder: two thin factors for each layer of a model that stays as it is, read by transformers and vLLM."""

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
PREFIX = "base_model.model."  # what PEFT puts before the names of the model's own modules
# What changes the product B A in other ways than a factor; an adapter that asks for any of it is not read.
BEYOND_LORA = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "layer_replication")


def layer_paths(network: Network) -> dict[str, str]:
    """The name of each linear layer's module in the model, by the layer's name in the checkpoint."""
    paths = {id(module): path for path, module in network.model.named_modules()}
    return {layer.name: paths[id(layer.module)] for layer in network.layers}


def check_adaptable(layers: Iterable[str]) -> None:
    """Raise OptionError for a layer that PEFT cannot put factors beside; the message names it."""
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
    """Write the `factors` of layers of `network`, all of rank `rank`, for the model that a person calls `base`.

    They are stored in the type that `dtype` gives for a layer's name.

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
        "task_type": "CAUSAL_LM" if network.kind == "causal-lm" else None,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,  # B A is added as it is
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": _targets(network.model, [paths[name] for name in factors]),
        "fan_in_fan_out": any(isinstance(layer.module, Conv1D) for layer in network.layers),
        "inference_mode": True,
    }
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def _targets(model: nn.Module, paths: list[str]) -> list[str]:
    """The modules that have factors: by their last names, where no other layer ends so, else in full."""
    ends = {path.rpartition(".")[2] for path in paths}
    every = [path for path, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    alone = {path for path in every if path.rpartition(".")[2] in ends} == set(paths)
    return sorted(ends) if alone else sorted(paths)


class AdaptedCheckpoint(CompressedCheckpoint):
    """The checkpoint in `folder` with the products of the adapter's factors added, as `read` gives it.

    `paths` are the modules' names by those of layers: `layer_paths`.

    Raises:
        CheckpointError: the adapter is no LoRA, is damaged, or does not fit the checkpoint.
    """

    def __init__(self, folder: Path, adapter: Path, paths: Mapping[str, str]) -> None:
        super().__init__(folder)
        config = read_json(adapter / CONFIG)
        rank, alpha = config.get("r"), config.get("lora_alpha")
        beyond = [key for key in BEYOND_LORA if config.get(key)]
        if config.get("peft_type") != "LORA" or beyond:
            what = ", ".join(beyond) or f"the peft_type {config.get('peft_type')}"
            raise CheckpointError(f"{adapter / CONFIG} has {what}, which Hesse does not read: merge it with PEFT first")
        if not (isinstance(rank, int) and isinstance(alpha, int | float) and rank > 0):
            raise CheckpointError(f"{adapter / CONFIG} gives no rank r and lora_alpha: copy the folder again")
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
            raise CheckpointError(f"{adapter / WEIGHTS} has {next(iter(tensors))}, of which {folder} has no layer")

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        found = super().read(names)
        for name in found.keys() & self._factors.keys():
            found[name] = self._adapted(name, found[name])
        return found

    def _adapted(self, name: str, weight: Tensor) -> Tensor:
        left, right = self._factors[name]
        shape = weight.shape[::-1] if self._transposed else weight.shape
        if left.shape[1:] != right.shape[:1] or (*left.shape[:1], *right.shape[1:]) != shape:
            raise CheckpointError(
                f"{self.folder}: {name} has shape {tuple(weight.shape)}, which factors of shapes {tuple(left.shape)} "
                f"and {tuple(right.shape)} do not fit: the adapter is of another model"
            )
        product = self._scale * (left @ right)
        return weight.float() + (product.T if self._transposed else product)

    @property
    def stored_bytes(self) -> int:
        return super().stored_bytes + self._adapter_bytes[0]

    @property
    def file_bytes(self) -> int:
        return super().file_bytes + self._adapter_bytes[1]
