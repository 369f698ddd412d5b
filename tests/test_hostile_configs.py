"""Configs that lie: sizes, architectures, and schemes that do not fit the tensors. Each is refused by name, at once."""

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_models
from helpers import IDS, change, compress
from hesse.errors import CheckpointError, HesseError, UnsupportedModelError
from hesse.formats import open_checkpoint
from hesse.networks.network import CheckpointNetwork, Network

FolderOf = Callable[[str], Path]
Edit = Callable[[dict[str, Any]], None]
ROOM = 1 << 30


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """No more than ROOM bytes beyond what the process has: whatever asks for far more fails at once."""
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else None
    if pages is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture
def model(family_folder: FolderOf, tmp_path: Path) -> Path:
    """A copy of a tiny model that a test may damage."""
    return Path(shutil.copytree(family_folder("llama"), tmp_path / "model"))


@pytest.fixture(scope="module")
def packed_model(family_folder: FolderOf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in 4 bits."""
    out = tmp_path_factory.mktemp("packed") / "out"
    compress(family_folder("llama"), out, bits=4, group_size=32, method="rtn", data=IDS[:2])
    return out


def edit_config(folder: Path, edit: Edit) -> Path:
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def network(folder: Path) -> Network:
    return CheckpointNetwork(open_checkpoint(folder), torch.float32, torch.device("cpu"))


def input_limit(folder: Path) -> int | None:
    return network(folder).input_limit


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000"),
        ({"num_hidden_layers": 10**4}, "describes more than"),
        ({"num_labels": 10**10}, "num_labels"),
        ({"text_config": {"n_layer": 10**12}}, "n_layer"),
        ({"hidden_size": 10**12}, "config and weights do not belong together"),
        ({"vocab_size": 2**62, "hidden_size": 2**40}, "config.json"),
        ({"head_dim": 10**11}, "computes buffers of|config and weights do not belong together"),
        ({"hidden_size": "wide"}, "config.json"),
        ({"num_attention_heads": 0}, "config.json"),
        ({"max_position_embeddings": "many"}, "config.json"),
        ({"architectures": {"0": "LlamaForCausalLM"}}, "names the architecture None"),
        ({"architectures": ["__class__"]}, "names the architecture __class__"),
        ({"architectures": [["LlamaForCausalLM"]]}, "names the architecture"),
        ({"model_type": ["llama"]}, "names no model_type"),
        ({"get_text_config": "no method"}, "config.json"),
        ({"hidden_act": "../../act"}, "config.json"),
        ({"attn_implementation": "someone/kernel"}, "is code from the hub"),
        ({"text_config": {"_attn_implementation": {"": "someone/kernel:attention"}}}, "is code from the hub"),
        ({"quantization_config": [1]}, "quant_method None"),
        ({"model_type": "low_rank_llama"}, "low_rank or architectures"),
        ({"model_type": "low_rank_llama", "low_rank": 3, "architectures": [4]}, "low_rank or architectures"),
    ],
    ids=str,
)
def test_a_config_that_lies(edit: dict[str, Any], named: str, model: Path) -> None:
    def lie(config: dict[str, Any]) -> None:
        if edit.get("model_type") == "low_rank_llama":
            config.pop("architectures")
        config.update(edit)

    edit_config(model, lie)
    with pytest.raises((CheckpointError, UnsupportedModelError), match=named):
        input_limit(model)


def test_buffers_out_of_all_proportion(tmp_path: Path) -> None:
    folder = tiny_models.save("gpt2", tmp_path)
    edit_config(folder, lambda config: config.update(n_positions=10**7))
    with pytest.raises(HesseError, match=r"buffers of|config\.json asks for"), network(folder).surroundings():
        pass


# Packed weights.

LAYER = "model.layers.0.self_attn.q_proj"


def weights(config: dict[str, Any]) -> dict[str, Any]:
    scheme: dict[str, Any] = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    return scheme


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("weight_shape", torch.tensor([2**40, 64])),
        ("weight_shape", torch.tensor([64, 2**62])),
        ("weight_shape", torch.tensor([-64, 64])),
        ("weight_shape", torch.tensor([64, 0])),
        ("weight_shape", torch.tensor([64.5, float("nan")])),
        ("weight_shape", torch.tensor(64)),
        ("weight_shape", torch.tensor([], dtype=torch.int64)),
        ("weight_packed", torch.zeros(64, 9, dtype=torch.int32)),
        ("weight_packed", torch.zeros(64, 8, dtype=torch.int16)),
        ("weight_packed", torch.tensor(1, dtype=torch.int32)),
        ("weight_scale", torch.ones(10**6, 2)),
        ("weight_scale", torch.ones(64, 10**6)),
        ("weight_scale", torch.ones(1, 1, 1, 64, 2)),
        ("weight_scale", None),
        ("weight_shape", None),
    ],
    ids=lambda value: str(tuple(value.shape)) if isinstance(value, torch.Tensor) else str(value),
)
def test_packed_tensors_that_do_not_fit(
    part: str, value: torch.Tensor | None, packed_model: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(packed_model, tmp_path / "packed"))

    def lie(tensors: dict[str, torch.Tensor]) -> None:
        tensors.pop(f"{LAYER}.{part}")
        if value is not None:
            tensors[f"{LAYER}.{part}"] = value

    change(folder, lie)
    with pytest.raises(CheckpointError, match=LAYER):
        open_checkpoint(folder).read([f"{LAYER}.weight"])


@pytest.mark.parametrize(
    "edit",
    [
        {"num_bits": 0},
        {"num_bits": -4},
        {"num_bits": 10**9},
        {"group_size": 0},
        {"group_size": 10**12},
        {"group_size": "many"},
        {"strategy": "block", "group_size": None, "block_structure": [0, 0]},
        {"strategy": "attn_head", "group_size": None},
        {"type": "float", "num_bits": 3},
        {"num_bits": {"a": [1]}},
    ],
    ids=str,
)
def test_a_scheme_that_does_not_fit(edit: dict[str, Any], packed_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(packed_model, tmp_path / "packed"))
    edit_config(folder, lambda config: weights(config).update(edit))
    with pytest.raises(CheckpointError, match=rf"{LAYER}|quantization_config"):
        open_checkpoint(folder).read([f"{LAYER}.weight"])


def test_blocks_larger_than_the_weight_take_no_memory(packed_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(packed_model, tmp_path / "packed"))
    block = {"strategy": "block", "group_size": None, "block_structure": [1 << 50, 32]}
    edit_config(folder, lambda config: weights(config).update(block))
    change(folder, lambda tensors: tensors.update({f"{LAYER}.weight_scale": torch.ones(1, 2)}))
    assert open_checkpoint(folder).read([f"{LAYER}.weight"])[f"{LAYER}.weight"].shape == (64, 64)


@pytest.mark.parametrize("pattern", ["re:(a|aa|e|d|m|o|l|.)+$x", "re:(", "re:" + "(" * 5000, "re:a{99999999999}"])
def test_patterns_that_take_for_ever(pattern: str, packed_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(packed_model, tmp_path / "packed"))
    edit_config(
        folder, lambda config: config["quantization_config"]["config_groups"]["group_0"].update(targets=[pattern])
    )
    with pytest.raises(CheckpointError, match=r"has the target|has no scheme"):
        open_checkpoint(folder).read([f"{LAYER}.weight"])


def test_factors_that_do_not_fit(family_folder: FolderOf, tmp_path: Path) -> None:
    folder = tmp_path / "thin"
    compress(family_folder("llama"), folder, method="svd", rank=4, data=IDS[:2])
    change(folder, lambda tensors: tensors.update({f"{LAYER}.0.weight": torch.zeros(5, 64)}))
    with pytest.raises(CheckpointError, match=f"the factors of {LAYER} cannot be multiplied"):
        open_checkpoint(folder).read([f"{LAYER}.weight"])
    change(folder, lambda tensors: tensors.pop(f"{LAYER}.0.weight") is None)
    with pytest.raises(CheckpointError, match=f"has no tensor {LAYER}.0.weight"):
        open_checkpoint(folder).read([f"{LAYER}.weight"])
