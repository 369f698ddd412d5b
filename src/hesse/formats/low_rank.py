"""Layers as two thin ones, run by a short model file that travels with the weights."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)

from hesse.constraints import LowRank, LowRankCode
from hesse.errors import OptionError
from hesse.formats.packed import PackedFormat

MODEL_FILE = "modeling_low_rank.py"
TYPE_PREFIX = "low_rank_"
CLASS_PREFIX = "LowRank_"
# The classes that load a model with a head, and the architectures that each of them knows.
HEADS = {
    "AutoModelForCausalLM": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForMaskedLM": MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "AutoModelForQuestionAnswering": MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "AutoModelForSequenceClassification": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForTokenClassification": MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
}


class LowRankFormat(PackedFormat):
    """`P.0` (rank, in) and `P.1` (out, rank) for each factorised layer P; other layers packed, dense or as they were.

    transformers runs it with `trust_remote_code=True`. Without that, loading fails: the model type is not one that
    transformers knows, and an empty `P.weight` stops classes that are named outright.
    """

    name = "low-rank"

    def _refuse(self) -> None:
        super()._refuse()
        for layer in self.layers.values():
            if layer.is_expert and isinstance(layer.constraint, LowRank):
                raise OptionError(
                    f"{layer.name}: transformers keeps experts in one tensor, so they cannot be two thin layers: leave "
                    "them out with --ignore '*.experts.*', or use --format dense"
                )

    def _rank(self, name: str) -> int | None:
        constraint = self.layers[name].constraint
        return constraint.rank if isinstance(constraint, LowRank) else None

    def as_stored(self, name: str, encoded: Any, weight: Tensor) -> Tensor:
        if not isinstance(encoded, LowRankCode):
            return super().as_stored(name, encoded, weight)
        # As a reader multiplies them: on the CPU, since another device rounds its sums otherwise.
        left, right = (factor.cpu().contiguous() for factor in (encoded.left, encoded.right))
        return (left @ right).to(weight.device)

    def tensors(self, name: str, encoded: Any, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        if not isinstance(encoded, LowRankCode):
            return super().tensors(name, encoded, weight, bias)
        dtype = self.network.checkpoint.dtype(f"{name}.weight")
        own = {
            f"{name}.0.weight": encoded.right.to(dtype).contiguous(),
            f"{name}.1.weight": encoded.left.to(dtype).contiguous(),
            f"{name}.weight": torch.empty(0, dtype=dtype),
        }
        return own if bias is None else {**own, f"{name}.1.bias": bias}

    def stored_bits(self, name: str) -> float:
        shape, rank = self.layers[name].shape, self._rank(name)
        if rank is None:
            return super().stored_bits(name)
        return torch.finfo(self.network.checkpoint.dtype(f"{name}.weight")).bits * rank * sum(shape) / shape.numel()

    def config(self) -> dict[str, Any]:
        source, model = self.network.checkpoint.config, self.network.model
        ranks = {name: rank for name in self.layers if (rank := self._rank(name)) is not None}
        architecture = type(model).__name__
        classes = {"AutoConfig": type(model.config).__name__, "AutoModel": type(model.base_model).__name__}
        classes |= {auto: architecture for auto, known in HEADS.items() if architecture in known.values()}
        module = MODEL_FILE.removesuffix(".py")
        config = {
            **source,
            "model_type": TYPE_PREFIX + source["model_type"],
            "architectures": [CLASS_PREFIX + architecture],
            "low_rank": ranks,
            "auto_map": {auto: f"{module}.{CLASS_PREFIX}{name}" for auto, name in classes.items()},
        }
        if self.packed:
            prefix = f"{model.base_model_prefix}."
            thin = tuple(rf"re:(.*\.)?{re.escape(name.removeprefix(prefix))}\.[01]$" for name in ranks)
            config["quantization_config"] = self.quantization_config(thin)
        return config

    def files(self) -> dict[str, str]:
        return {MODEL_FILE: (Path(__file__).parent / "remote" / MODEL_FILE).read_text(encoding="utf-8")}
