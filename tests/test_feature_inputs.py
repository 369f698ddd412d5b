"""Models of images and sounds: refused in one line where only text is given, compressed in Python on their inputs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import hesse
from hesse.errors import UnsupportedModelError

OPTIONS = hesse.Options(bits=4, group_size=16)
SIZES = {
    "d_model": 64,
    "vocab_size": 256,
    **{f"{half}_{name}": size for half in ("encoder", "decoder") for name, size in (("layers", 2), ("ffn_dim", 128))},
    **{f"{half}_attention_heads": 4 for half in ("encoder", "decoder")},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3},
}


def vision() -> tuple[PreTrainedModel, list[dict[str, Any]]]:
    """Return an image classifier and its samples."""
    config = ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, image_size=32, num_labels=5
    )
    samples = [{"pixel_values": torch.randn(3, 32, 32), "labels": torch.tensor(i % 5)} for i in range(8)]
    return ViTForImageClassification(config).eval(), samples


def speech() -> tuple[PreTrainedModel, list[dict[str, Any]]]:
    """Return a speech recognizer and its samples."""
    extent = {"num_mel_bins": 16, "max_source_positions": 32, "max_target_positions": 64}
    config = WhisperConfig(**SIZES, **extent, suppress_tokens=None, begin_suppress_tokens=None)
    samples = [{"input_features": torch.randn(16, 64), "labels": torch.randint(4, 250, (12,))} for _ in range(8)]
    return WhisperForConditionalGeneration(config).eval(), samples


@pytest.mark.parametrize("build", [vision, speech])
def test_text_is_refused_before_any_work_and_the_message_says_what_to_do(build: Any, tmp_path: Path) -> None:
    model, samples = build()
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match=f"takes {next(iter(samples[0]))}.*hesse.compress") as refusal:
        hesse.compress(tmp_path / "model", tmp_path / "out", method="rtn", options=OPTIONS, device="cpu")
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("build", [vision, speech])
@pytest.mark.parametrize("method", ["gptq", "kronecker"])
def test_batches_of_features_compress_the_model_in_python(build: Any, method: str) -> None:
    torch.manual_seed(0)
    model, samples = build()
    result = hesse.compress(model, method=method, options=OPTIONS, data=DataLoader(samples, batch_size=4))
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    compressed = {layer.name for layer in result.report.layers}
    assert set(names) - {"proj_out"} <= compressed
    batch = next(iter(DataLoader(samples, batch_size=8)))
    with torch.no_grad():
        losses = [float(m(**batch).loss) for m in (model, result.model)]
    assert result.report.loss is not None
    assert result.report.loss.measured == pytest.approx(losses[1] - losses[0], abs=1e-4)


def test_an_encoder_decoder_in_memory_takes_lists_of_token_ids() -> None:
    torch.manual_seed(0)
    model = BartForConditionalGeneration(BartConfig(**SIZES, max_position_embeddings=64)).eval()
    ids = torch.randint(4, 250, (8, 24))
    result = hesse.compress(model, method="kronecker", options=OPTIONS, data=ids.tolist())
    with torch.no_grad():
        losses = [float(m(input_ids=ids, labels=ids).loss) for m in (model, result.model)]
    assert len(result.report.layers) == 2 * 6 + 2 * 10
    assert result.report.loss is not None
    assert result.report.loss.measured == pytest.approx(losses[1] - losses[0], abs=1e-3)
