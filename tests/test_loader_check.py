"""What is written is loaded by transformers itself; whatever it would make something else of is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import hesse
import tiny_models
from helpers import IDS, WEIGHTS, compress
from hesse.errors import OptionError, VerificationError
from hesse.formats import open_checkpoint
from hesse.jobs.loader_check import check_loads
from hesse.networks.network import CheckpointNetwork


def check(folder: Path, source: Path) -> str | None:
    network = CheckpointNetwork(open_checkpoint(folder), torch.float32, torch.device("cpu"))
    return check_loads(network, open_checkpoint(source), torch.tensor(IDS[:1]))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loader")
    source = tiny_models.save("llama", folder / "dense", torch.bfloat16)
    compress(source, folder / "out", method="rtn", bits=4, group_size=32)
    return folder / "out"


def copied(packed: Path, folder: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> Path:
    """A copy of `packed` with changed tensors and quantization config."""
    folder.mkdir()
    tensors, config = load_file(packed / WEIGHTS), json.loads((packed / "config.json").read_text())
    change(tensors, config["quantization_config"])
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "qwen2-moe"])
def test_what_is_written_is_what_transformers_loads(name: str, tmp_path: Path) -> None:
    source = tiny_models.save(name, tmp_path / "dense")
    compress(source, tmp_path / "out", method="rtn", bits=4, group_size=32)
    assert check(tmp_path / "out", source) is None


def test_a_scheme_that_transformers_reads_otherwise_is_refused(packed: Path, tmp_path: Path) -> None:
    """A layer that the config leaves out is packed in the file: transformers finds no weight for it."""

    def change(tensors: dict[str, Tensor], quantization: dict[str, Any]) -> None:
        quantization["ignore"].append("re:.*layers[.]1[.]mlp[.]up_proj$")

    with pytest.raises(VerificationError, match=r"layers\.1\.mlp\.up_proj.*nothing was put in place"):
        check(copied(packed, tmp_path / "other", change), packed.parent / "dense")


def test_a_tensor_that_transformers_does_not_read_is_refused_by_name(packed: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor], quantization: dict[str, Any]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight_of_another_program"] = torch.zeros(3)

    with pytest.raises(VerificationError, match=r"does not read model\.layers\.0\.mlp\.up_proj\.weight_of_another"):
        check(copied(packed, tmp_path / "other", change), packed.parent / "dense")


def test_other_hidden_states_are_refused_with_the_block(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our reader is made to decode one layer otherwise than transformers does."""
    read = type(open_checkpoint(packed)).read

    def otherwise(self: Any, names: Any) -> dict[str, Tensor]:
        tensors = read(self, names)
        return {n: t * 1.01 if n == "model.layers.1.mlp.down_proj.weight" else t for n, t in tensors.items()}

    monkeypatch.setattr(type(open_checkpoint(packed)), "read", otherwise)
    with pytest.raises(VerificationError, match=r"hidden states after model\.layers\.1 are others in transformers"):
        check(packed, packed.parent / "dense")


def test_a_refused_result_never_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise VerificationError("transformers does not read x: nothing was put in place")

    source = tiny_models.save("llama", tmp_path / "dense")
    monkeypatch.setattr("hesse.jobs.job.check_loads", refuse)
    with pytest.raises(VerificationError, match="does not read x"):
        compress(source, tmp_path / "out", method="rtn", bits=4, group_size=32)
    assert not (tmp_path / "out").exists()


def test_a_model_with_code_of_its_own_is_said_not_to_be_verified(tmp_path: Path) -> None:
    source = tiny_models.save("llama", tmp_path / "dense")
    report = compress(source, tmp_path / "out", method="svd", rank=4, format="low-rank")
    assert any(note.startswith("not verified by transformers: it comes with code") for note in report.notes)


def test_pruned_models_are_loaded_by_transformers_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[CheckpointNetwork] = []
    monkeypatch.setattr("hesse.jobs.job.check_loads", lambda network, source, ids: checked.append(network))
    source = tiny_models.save("llama", tmp_path / "dense")
    hesse.prune(source, tmp_path / "out", what="hidden", keep=0.5, data=IDS)
    assert len(checked) == 1


def test_what_would_not_load_is_known_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class whose `_init_weights` touches the weight of a packed layer cannot be loaded packed."""
    from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

    initialize = LlamaPreTrainedModel._init_weights

    def touch(self: Any, module: torch.nn.Module) -> None:
        if isinstance(module, torch.nn.Linear):
            module.weight.data  # noqa: B018
        initialize(self, module)

    source = tiny_models.save("llama", tmp_path / "dense")
    monkeypatch.setattr(LlamaPreTrainedModel, "_init_weights", touch)
    report = compress(source, tmp_path / "out", method="rtn", bits=4, group_size=32)
    assert report.format == "dense"
    assert any("stored dense" in note and "no attribute 'weight'" in note for note in report.notes)
    with pytest.raises(OptionError, match="pack-quantized weights of LlamaForCausalLM would not load: transformers"):
        compress(source, tmp_path / "other", method="rtn", bits=4, group_size=32, format="pack-quantized")
    assert not (tmp_path / "other").exists()
