"""Loss, divergence and size of checkpoints on disk, against direct computation from what transformers loads."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import hesse
import tiny_models
from helpers import OTHER_IDS, compress, dense_tensors, output, twin
from hesse.errors import CheckpointError, DataError, OptionError

FolderOf = Callable[[str], Path]
UNEVEN = [*tiny_models.random_ids(3, 24, seed=5), *tiny_models.random_ids(2, 9, seed=6)]


def logs_and_labels(name: str, folder: Path, samples: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Log probabilities (tokens, vocabulary) of each next token, and the tokens, in double precision."""
    model = tiny_models.load(name, folder, dtype=torch.float32)
    logits = torch.cat([output(model, [ids])[0, :-1] for ids in samples])
    return logits.double().log_softmax(-1), torch.cat([torch.tensor(ids[1:]) for ids in samples])


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3-moe"])
def test_loss_and_divergence_are_those_of_the_logits(name: str, family_folder: FolderOf, tmp_path: Path) -> None:
    source, out = family_folder(name), tmp_path / "out"
    compress(source, out, bits=3, group_size=32)
    found = hesse.evaluate(out, reference=source, data=UNEVEN).report
    logs, labels = logs_and_labels(name, twin(out, tmp_path / "twin", source), UNEVEN)
    dense, _ = logs_and_labels(name, source, UNEVEN)
    divergence = (dense.exp() * (dense - logs)).sum(-1)
    assert (found.kind, found.samples, found.tokens) == ("causal-lm", 5, 3 * 23 + 2 * 8)
    assert found.model_loss == pytest.approx(nn.functional.nll_loss(logs, labels).item(), abs=1e-4)
    assert found.reference_loss == pytest.approx(nn.functional.nll_loss(dense, labels).item(), abs=1e-4)
    assert found.loss_increase == pytest.approx(found.model_loss - found.reference_loss)
    assert found.perplexity == pytest.approx(math.exp(found.model_loss))
    assert found.kl == pytest.approx(divergence.mean().item(), rel=1e-3)
    assert found.kl_standard_error == pytest.approx(
        divergence.std(correction=0).item() / math.sqrt(len(labels)), rel=1e-2
    )
    assert found.top1_agreement == pytest.approx(
        (dense.argmax(-1) == logs.argmax(-1)).double().mean().item(), abs=1.5 / len(labels)
    )
    assert found.hidden_error is None


def test_size_counts_what_is_stored(half_folder: FolderOf, tmp_path: Path) -> None:
    source, out = half_folder("llama-tied"), tmp_path / "out"
    report = compress(source, out, bits=4, group_size=32)
    found, dense = hesse.evaluate(out, data=OTHER_IDS).report, hesse.evaluate(source, data=OTHER_IDS).report
    parameters = sum(tensor.numel() for tensor in dense_tensors(source).values())
    assert found.parameters == dense.parameters == parameters
    assert found.bytes == sum(path.stat().st_size for path in out.glob("*.safetensors")) == report.bytes_after
    assert dense.bits_per_weight == 16
    assert found.bits_per_weight == report.bits_per_weight_model < 16


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_model_is_no_distance_from_itself(name: str, family_folder: FolderOf) -> None:
    found = hesse.evaluate(family_folder(name), reference=family_folder(name), data=OTHER_IDS).report
    assert found.kl == 0
    assert found.kl_standard_error == 0
    assert found.top1_agreement == 1
    assert found.loss_increase == 0


def test_batch_size_and_samples(family_folder: FolderOf) -> None:
    one = hesse.evaluate(family_folder("llama"), data=UNEVEN, batch_size=1).report
    many = hesse.evaluate(family_folder("llama"), data=UNEVEN, batch_size=8).report
    assert one.tokens == many.tokens
    assert one.model_loss == pytest.approx(many.model_loss, rel=1e-5)


@pytest.mark.parametrize("name", tiny_models.ENCODERS)
def test_encoders_are_compared_by_their_hidden_states(name: str, family_folder: FolderOf, tmp_path: Path) -> None:
    source, out = family_folder(name), tmp_path / "out"
    compress(source, out, method="rtn", bits=4, group_size=32)
    found = hesse.evaluate(out, reference=source, data=OTHER_IDS).report

    def hidden(folder: Path) -> Tensor:
        model = tiny_models.load(name, folder, dtype=torch.float32).base_model
        with torch.no_grad():
            return model(input_ids=torch.tensor(OTHER_IDS)).last_hidden_state.double().flatten(0, 1)

    changed, dense = hidden(twin(out, tmp_path / "twin", source)), hidden(source)
    square = (changed - dense).square().sum(-1)
    assert (found.kind, found.tokens) == ("encoder", 96)
    assert found.hidden_error == pytest.approx(square.mean().item() / 2, rel=1e-3)
    assert found.hidden_relative_error == pytest.approx((square.sum() / dense.square().sum()).item(), rel=1e-3)
    cosine = nn.functional.cosine_similarity(changed, dense).mean().item()
    assert found.hidden_cosine == pytest.approx(cosine, abs=1e-5)
    assert found.model_loss is None
    assert found.perplexity is None
    assert found.kl is None


def test_an_encoder_needs_a_reference(family_folder: FolderOf) -> None:
    with pytest.raises(OptionError, match=r"give --reference"):
        hesse.evaluate(family_folder("bert"), data=OTHER_IDS)


def test_only_alike_models_are_compared(family_folder: FolderOf, tmp_path: Path) -> None:
    other = tiny_models.save("llama", tmp_path / "other", vocab_size=520)
    for reference in (other, family_folder("bert")):
        with pytest.raises(OptionError, match=r"different kinds or vocabularies"):
            hesse.evaluate(family_folder("llama"), reference=reference, data=OTHER_IDS)
    with pytest.raises(OptionError, match=r"different kinds or vocabularies"):
        hesse.evaluate(family_folder("bert"), reference=family_folder("llama"), data=OTHER_IDS)


def test_a_token_outside_the_vocabulary_is_named(family_folder: FolderOf, tmp_path: Path) -> None:
    ids = [[5, 6, tiny_models.VOCABULARY]]
    with pytest.raises(DataError, match=r"token id 512, but the model knows 512"):
        hesse.evaluate(family_folder("llama"), data=ids)
    with pytest.raises(DataError, match=r"token id 512"):
        compress(family_folder("llama"), tmp_path / "out", data=ids)


def test_a_missing_reference_is_named(family_folder: FolderOf, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing"):
        hesse.evaluate(family_folder("llama"), reference=tmp_path / "nothing", data=OTHER_IDS)
