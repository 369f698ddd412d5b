"""The card of a written model, as huggingface_hub's parser reads it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import metadata_load

import hesse
import tiny_models
from helpers import IDS, compress
from hesse.jobs.model_card import base_model_id, read_metadata

FolderOf = Callable[[str], Path]
CARD = """---
license: other
license_name: house
license_link: LICENSE
language: [en, de]
pipeline_tag: text-generation
datasets: [owner/not-ours]
tags: [chat]
---
# The base's own words
"""


@pytest.fixture
def cached(tmp_path: Path) -> Path:
    """A model with a card, in a folder as the hub's cache has it."""
    folder = tmp_path / "models--owner--name" / "snapshots" / "0123"
    tiny_models.save("llama", folder)
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    return folder


def card_of(folder: Path) -> tuple[ModelCardData, str]:
    card = ModelCard.load(folder / "README.md")
    assert metadata_load(folder / "README.md") == card.data.to_dict()
    return card.data, card.text


def test_a_compressed_models_card(cached: Path, tmp_path: Path) -> None:
    report = compress(cached, tmp_path / "out", method="gptq", bits=4, group_size=32)
    data, text = card_of(tmp_path / "out")
    assert data.base_model == "owner/name"
    assert data.base_model_relation == "quantized"
    assert (data.library_name, data.license, data.license_name) == ("transformers", "other", "house")
    assert (data.language, data.pipeline_tag) == (["en", "de"], "text-generation")
    assert data.datasets is None
    assert data.tags == ["hesse", "compress", "compressed-tensors"]
    for part in (
        "owner/name, compressed by Hesse",
        "| method | gptq |",
        "Gram × Grid × ErrorFeedback: grid (bits 4, group_size 32",
        f"| bytes of weights | {report.bytes_after:,}, from {report.bytes_before:,} |",
        f"| loss increase predicted, nats per token | {report.loss.predicted:.4g} |",
        f"{report.loss.measured:.4g} ± ",
        "8 samples of 32 tokens: the token ids given",
        "AutoModelForCausalLM.from_pretrained",
        "pip install transformers compressed-tensors",
    ):
        assert part in text
    assert "own words" not in text
    assert str(tmp_path) not in text


def test_other_commands_write_cards_and_name_the_first_model(cached: Path, tmp_path: Path) -> None:
    hesse.rotate(cached, tmp_path / "rotated", data=IDS)
    rotated, text = card_of(tmp_path / "rotated")
    assert (rotated.base_model, rotated.get("base_model_relation"), rotated.license) == ("owner/name", None, "other")
    assert "owner/name, rotated by Hesse" in text
    hesse.prune(tmp_path / "rotated", tmp_path / "pruned", IDS, what="hidden", keep=0.5)
    pruned, text = card_of(tmp_path / "pruned")
    assert (pruned.base_model, pruned.license, pruned.tags) == ("owner/name", "other", ["hesse", "prune"])
    assert "compressed-tensors" not in text
    compress(cached, tmp_path / "rounded", method="rtn", bits=2, group_size=32)
    hesse.repair(cached, tmp_path / "rounded", tmp_path / "repaired", rank=2, format="dense", data=IDS)
    repaired, text = card_of(tmp_path / "repaired")
    assert (repaired.base_model, repaired.tags) == ("owner/name", ["hesse", "repair"])
    assert "quantization_config" not in text


def test_a_low_rank_models_card_says_how_to_load_it(half_folder: FolderOf, tmp_path: Path) -> None:
    compress(half_folder("llama"), tmp_path / "out", method="activation-svd", rank=4)
    data, text = card_of(tmp_path / "out")
    assert data.base_model is None  # a folder is no id
    assert "trust_remote_code=True" in text
    assert half_folder("llama").name in text
    assert str(half_folder("llama").parent) not in text


@pytest.mark.parametrize(
    ("card", "metadata"),
    [
        ("no front matter", {}),
        ("---\n[1, 2\n---\n", {}),
        ("---\n- a list\n---\n", {}),
        ("---\nlicense: no\nlanguage: {a: b}\ntags: [[a]]\nlicense_name: ''\n---\n", {"license": "no"}),
        ("---\r\nlicense: mit\r\n---\r\ntext", {"license": "mit"}),
        ("---\nlicense: !!python/object:os.system x\n---\n", {"license": "x"}),
        (f"---\n{'[' * 5000}\n---\n", {}),
        (f'---\nlicense: {"a" * 300}\nlanguage: "e\\x1bn"\n---\n', {}),
    ],
)
def test_only_plain_texts_of_a_bases_card_are_read(card: str, metadata: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(card.encode())
    assert read_metadata(tmp_path) == metadata


def test_a_card_that_is_a_link_out_of_the_folder_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "secret.md").write_text("---\nlicense: mine\n---\n", encoding="utf-8")
    (tmp_path / "model" / "README.md").symlink_to("../secret.md")
    assert read_metadata(tmp_path / "model") == {}


def test_the_base_model_is_an_id_of_the_hub_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert base_model_id("owner/name", tmp_path, {}) == "owner/name"
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert base_model_id("owner/name", tmp_path / "owner" / "name", {}) is None
    assert base_model_id("default", tmp_path, {}) is None
    assert base_model_id("x", tmp_path, {"base_model": "a/b", "tags": ["hesse"]}) == "a/b"
    assert base_model_id("x", tmp_path, {"base_model": "a/b", "tags": ["lora"]}) is None
