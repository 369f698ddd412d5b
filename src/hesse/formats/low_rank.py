"""Layers as two thin ones, run by a short model file that travels with the weights."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hesse.constraints import LowRank, LowRankCode
from hesse.errors import OptionError
from hesse.formats.dense import DenseFormat
from hesse.formats.packed import PackedFormat

MODEL_FILE = "modeling_low_rank.py"
TYPE_PREFIX = "low_rank_"
CLASS_PREFIX = "LowRank_"


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

    def tensors(self, name: str, encoded: Any, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        if not isinstance(encoded, LowRankCode):
            kind = PackedFormat if self.layers[name] in self.packed else DenseFormat
            return kind.tensors(self, name, encoded, weight, bias)  # type: ignore[arg-type]
        dtype = self.network.checkpoint.dtype(f"{name}.weight")
        own = {
            f"{name}.0.weight": encoded.right.to(dtype).contiguous(),
            f"{name}.1.weight": encoded.left.to(dtype).contiguous(),
            f"{name}.weight": torch.empty(0, dtype=dtype),
        }
        return own if bias is None else {**own, f"{name}.1.bias": bias}

    def stored_bits(self, name: str) -> float:
        layer, rank = self.layers[name], self._rank(name)
        bits = torch.finfo(self.network.checkpoint.dtype(f"{name}.weight")).bits
        if rank is not None:
            return bits * rank * sum(layer.shape) / layer.shape.numel()
        return super().stored_bits(name) if layer in self.packed else bits

    def config(self) -> dict[str, Any]:
        source = self.network.checkpoint.config
        ranks = {name: rank for name in self.layers if (rank := self._rank(name)) is not None}
        architecture = type(self.network.model).__name__
        config_class = type(self.network.model.config).__name__
        module = MODEL_FILE.removesuffix(".py")
        auto = "AutoModelForCausalLM" if self.network.kind == "causal-lm" else "AutoModel"
        config = {
            **source,
            "model_type": TYPE_PREFIX + source["model_type"],
            "architectures": [CLASS_PREFIX + architecture],
            "low_rank": ranks,
            "auto_map": {
                "AutoConfig": f"{module}.{CLASS_PREFIX}{config_class}",
                auto: f"{module}.{CLASS_PREFIX}{architecture}",
            },
        }
        if self.packed:
            prefix = f"{self.network.model.base_model_prefix}."
            thin = tuple(rf"re:(.*\.)?{re.escape(name.removeprefix(prefix))}\.[01]$" for name in ranks)
            config["quantization_config"] = self.quantization_config(thin)
        return config

    def files(self) -> dict[str, str]:
        return {MODEL_FILE: (Path(__file__).parent / "remote" / MODEL_FILE).read_text(encoding="utf-8")}
