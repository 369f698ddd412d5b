"""Models of every kind of input are streamed as plain transformers runs them on text."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import hesse
from hesse.checkpoints.checkpoint import Checkpoint
from hesse.networks.network import CheckpointNetwork, each_loaded
from hesse.networks.towers import towers
from hesse.passes.stream import advance, finish, start

BENCH = Path(__file__).parents[1] / "bench"
sys.path.insert(0, str(BENCH))

import zoo_models  # noqa: E402

IDS = torch.tensor(zoo_models.random_ids(4, 24))
# Type: the name of the text blocks, and the towers.
PICTURES = {
    "llava": ("model.language_model.layers", ["model.vision_tower"]),
    "mistral3": ("model.language_model.layers", ["model.vision_tower"]),
    "qwen2_5_vl": ("model.language_model.layers", ["model.visual"]),
    "qwen3_vl": ("model.language_model.layers", ["model.visual"]),
    "gemma3": ("model.language_model.layers", ["model.vision_tower"]),
    "idefics3": ("model.text_model.layers", ["model.vision_model"]),
    "llama4": ("language_model.model.layers", ["vision_model"]),
}


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[PreTrainedModel, Path]]:
    """Return a function that builds and saves the tiny model of a class of transformers and a type."""
    known: dict[tuple[str, str], tuple[PreTrainedModel, Path]] = {}

    def build(cls: str, model_type: str) -> tuple[PreTrainedModel, Path]:
        if (cls, model_type) not in known:
            model = zoo_models.build(zoo_models.model_class(cls), zoo_models.shrink(model_type))
            folder = tmp_path_factory.mktemp(model_type)
            model.save_pretrained(folder)
            known[cls, model_type] = model, folder
        return known[cls, model_type]

    return build


def streamed(folder: Path, ids: Tensor = IDS) -> tuple[CheckpointNetwork, Tensor]:
    """Return a folder's network, and what it gives for `ids` block by block."""
    network = CheckpointNetwork(Checkpoint(folder), torch.float32, torch.device("cpu"))
    (flow,) = start(network, [ids])
    for index, block in each_loaded(network):
        advance([flow], block.module, index)
    with network.surroundings() as model, torch.no_grad():
        return network, finish(network, model, flow)


@pytest.mark.parametrize("name", PICTURES)
def test_a_model_for_images_and_text_is_a_language_model_whose_towers_stay(name: str, built, tmp_path: Path) -> None:
    blocks, tower = PICTURES[name]
    model, folder = built(zoo_models.groups()["image-text"][name], name)
    network, logits = streamed(folder)
    assert network.kind == "causal-lm"
    assert network.blocks[0].name == f"{blocks}.0"
    assert list(towers(network.model)) == tower
    torch.testing.assert_close(logits, zoo_models.output(model, {"input_ids": IDS}), atol=1e-5, rtol=1e-5)


def test_the_blocks_are_the_text_model_s_where_a_tower_is_larger_and_deeper(tmp_path: Path) -> None:
    config = zoo_models.shrink("qwen2_5_vl")
    config.vision_config.depth = 6
    model = zoo_models.build(zoo_models.model_class("Qwen2_5_VLForConditionalGeneration"), config)
    model.save_pretrained(tmp_path)
    network, logits = streamed(tmp_path)
    assert len(network.blocks) == config.text_config.num_hidden_layers
    torch.testing.assert_close(logits, zoo_models.output(model, {"input_ids": IDS}), atol=1e-5, rtol=1e-5)


def test_the_report_lists_a_tower_in_one_line_with_its_weights(built, tmp_path: Path) -> None:
    model, folder = built("LlavaForConditionalGeneration", "llava")
    hesse.compress(
        folder, tmp_path / "out", method="rtn", options=hesse.Options(bits=4, group_size=32), data=IDS.tolist()
    )
    notes = json.loads((tmp_path / "out" / "hesse-report.json").read_text())["notes"]
    weights = sum(m.weight.numel() for m in model.model.vision_tower.modules() if isinstance(m, torch.nn.Linear))
    (note,) = (note for note in notes if note.startswith("model.vision_tower: "))
    assert f"{weights:,} linear weights stay dense" in note


@pytest.mark.parametrize(
    ("cls", "model_type"),
    [
        ("LlamaModel", "llama"),
        ("LlamaForSequenceClassification", "llama"),
        ("Qwen2_5_VLModel", "qwen2_5_vl"),
        ("LlavaModel", "llava"),
    ],
)
def test_no_cache_is_among_the_arguments_of_blocks(cls: str, model_type: str, built) -> None:
    model, folder = built(cls, model_type)
    network = CheckpointNetwork(Checkpoint(folder), torch.float32, torch.device("cpu"))
    (flow,) = start(network, [IDS])
    for _ in range(2):  # twice through the same blocks, as the passes of a compression do
        flow.waiting, flow.step = start(network, [IDS])[0].waiting, 0
        for index, block in each_loaded(network):
            advance([flow], block.module, index)
    assert all(call.get("past_key_values") is None for call in flow.calls)
    with torch.no_grad():
        expected = model.base_model(input_ids=IDS).last_hidden_state
    with network.surroundings() as inner, torch.no_grad():
        torch.testing.assert_close(finish(network, inner, flow), expected, atol=1e-5, rtol=1e-5)
    assert all(getattr(m.config, "use_cache", True) for m in network.model.modules() if isinstance(m, type(model)))


@pytest.mark.parametrize("method", ["kronecker", "gptq"])
def test_a_layer_whose_inputs_are_all_zero_is_rounded_to_nearest(method: str, built, tmp_path: Path) -> None:
    model, _ = built("LlamaForCausalLM", "llama")
    silent = type(model)(model.config).eval()
    silent.load_state_dict(model.state_dict())
    with torch.no_grad():
        silent.model.layers[1].mlp.up_proj.weight.zero_()
    silent.save_pretrained(tmp_path / "model")
    options = hesse.Options(bits=4, group_size=16)
    result = hesse.compress(tmp_path / "model", tmp_path / "out", method=method, options=options, data=IDS.tolist())
    name = "model.layers.1.mlp.down_proj"
    assert any(note.startswith(f"{name}: all its inputs are zero on this data") for note in result.report.notes)
