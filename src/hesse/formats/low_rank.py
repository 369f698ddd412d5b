"""Low-rank format: each linear layer as two smaller ones, run by a short model file stored with the weights."""

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
# The Auto classes that load a model with a head, with the architectures of each.
HEADS = {
    "AutoModelForCausalLM": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForMaskedLM": MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "AutoModelForQuestionAnswering": MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "AutoModelForSequenceClassification": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForTokenClassification": MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
}


class LowRankFormat(PackedFormat):
    """Factors `P.0` (rank, in) and `P.1` (out, rank) of each factorised layer P; others packed, dense or unchanged.

    transformers runs the model with `trust_remote_code=True`. Otherwise loading fails: transformers does not know the
    model type, and an empty `P.weight` stops a class that is named explicitly.
    """

    name = "low-rank"

    def _check_loadable(self) -> None:
        super()._check_loadable()
        for layer in self.layers.values():
            if layer.is_expert and isinstance(layer.constraint, LowRank):
                raise OptionError(
                    f"{layer.name}: transformers keeps experts in one tensor, so they cannot be factorised: leave "
                    "them out with --ignore '*.experts.*', or use --format dense"
                )

    def _rank(self, name: str) -> int | None:
        constraint = self.layers[name].constraint
        return constraint.rank if isinstance(constraint, LowRank) else None

    def as_stored(self, name: str, encoded: Any, weight: Tensor) -> Tensor:
        if not isinstance(encoded, LowRankCode):
            return super().as_stored(name, encoded, weight)
        # On the CPU, as a reader multiplies them: other devices round sums differently.
        left, right = (factor.cpu().contiguous() for factor in (encoded.left, encoded.right))
        return (left @ right).to(weight.device)

    def tensors(self, name: str, encoded: Any, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        if not isinstance(encoded, LowRankCode):
            return super().tensors(name, encoded, weight, bias)
        dtype = self.dtype(name)
        tensors = {
            f"{name}.0.weight": encoded.right.to(dtype).contiguous(),
            f"{name}.1.weight": encoded.left.to(dtype).contiguous(),
            f"{name}.weight": torch.empty(0, dtype=dtype),
        }
        return tensors if bias is None else {**tensors, f"{name}.1.bias": bias}

    def stored(self, name: str) -> dict[str, Tensor]:
        if (rank := self._rank(name)) is None:
            return super().stored(name)
        (rows, columns), dtype = self.layers[name].shape, self.dtype(name)
        shapes = {f"{name}.0.weight": (rank, columns), f"{name}.1.weight": (rows, rank), f"{name}.weight": (0,)}
        return {key: torch.empty(shape, dtype=dtype, device="meta") for key, shape in shapes.items()}

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
            factors = tuple(rf"re:(.*\.)?{re.escape(name.removeprefix(prefix))}\.[01]$" for name in ranks)
            config["quantization_config"] = self.quantization_config(factors)
        return config

    def files(self) -> dict[str, str]:
        return {MODEL_FILE: (Path(__file__).parent / "remote" / MODEL_FILE).read_text(encoding="utf-8")}
