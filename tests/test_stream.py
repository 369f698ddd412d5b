"""The walk over blocks against plain transformers, for every family."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import tiny_models
from hesse.checkpoints.checkpoint import Checkpoint
from hesse.errors import CheckpointError, DataError, UnsupportedModelError
from hesse.networks.network import Layer, Network
from hesse.passes.stream import advance, advance_with_stops, finish, start

FolderOf = Callable[[str], Path]
CPU = torch.device("cpu")


def reference(name: str, folder: Path, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        model = tiny_models.load(name, folder)
        if name in tiny_models.ENCODERS:
            return model.base_model(input_ids=ids).last_hidden_state
        return model(input_ids=ids).logits


@pytest.mark.parametrize("name", tiny_models.FAMILIES)
def test_stream_equals_transformers(name: str, family_folder: FolderOf) -> None:
    folder = family_folder(name)
    ids = torch.tensor(tiny_models.random_ids(5, 24))
    network = Network(Checkpoint(folder), torch.float32, CPU)
    assert network.kind == ("encoder" if name in tiny_models.ENCODERS else "causal-lm")
    flows = start(network, ids.split(2))
    for index, block in enumerate(network.blocks):
        with network.loaded(block) as module:
            advance(flows, module, index)
        assert all(parameter.is_meta for parameter in block.module.parameters())
    with network.surroundings() as model, torch.no_grad():
        streamed = torch.cat([finish(network, model, flow) for flow in flows])
    assert all(parameter.is_meta for parameter in network.model.parameters())
    torch.testing.assert_close(streamed, reference(name, folder, ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", tiny_models.FAMILIES)
def test_every_layer_is_met_once_with_its_own_inputs(name: str, family_folder: FolderOf) -> None:
    """Stopping at each layer changes nothing, and collects what forward hooks on the whole model see."""
    folder = family_folder(name)
    ids = torch.tensor(tiny_models.random_ids(3, 16))
    network = Network(Checkpoint(folder), torch.float32, CPU)
    flows = start(network, ids.split(1))
    seen: dict[str, int] = {}
    order: list[str] = []
    for index, block in enumerate(network.blocks):
        with network.loaded(block):
            current: list[Layer] = []

            def collect(layer: Layer, inputs: torch.Tensor) -> None:
                seen[layer.name] = seen.get(layer.name, 0) + inputs.reshape(-1, inputs.shape[-1]).shape[0]

            def change(layer: Layer, current: list[Layer] = current) -> None:
                current.append(layer)

            missed = advance_with_stops(flows, block, index, collect, change)
            order += [layer.name for layer in current]
            assert not missed
            assert {layer.name for layer in current} == {layer.name for layer in block.layers}
    assert len(order) == len(set(order)) == len(network.layers)
    for layer, tokens in seen.items():
        assert tokens <= ids.numel() or "experts" in layer
        if "expert" not in layer:
            assert tokens == ids.numel()
    with network.surroundings() as model, torch.no_grad():
        streamed = torch.cat([finish(network, model, flow) for flow in flows])
    torch.testing.assert_close(streamed, reference(name, folder, ids), atol=1e-5, rtol=1e-5)


def test_layers_after_a_changed_layer_see_the_change(family_folder: FolderOf) -> None:
    network = Network(Checkpoint(family_folder("llama")), torch.float32, CPU)
    flows = start(network, [torch.tensor(tiny_models.random_ids(2, 16))])
    inputs: dict[str, torch.Tensor] = {}
    with network.loaded(network.blocks[0]):
        advance_with_stops(
            flows,
            network.blocks[0],
            0,
            lambda layer, x: inputs.update({layer.name: x}),
            lambda layer: layer.replace(torch.zeros_like(layer.weight)),
        )
    assert not inputs["model.layers.0.self_attn.o_proj"].any()
    assert "model.layers.0.self_attn.k_proj" not in inputs  # it shares the queries' inputs


def test_equal_arguments_of_blocks_are_kept_once(family_folder: FolderOf) -> None:
    network = Network(Checkpoint(family_folder("gemma3")), torch.float32, CPU)
    flows = start(network, torch.tensor(tiny_models.random_ids(4, 16)).split(1))
    first = flows[0].calls[0]["position_embeddings"][0]
    assert all(flow.calls[0]["position_embeddings"][0] is first for flow in flows)


def test_unknown_architecture_is_named(family_folder: FolderOf, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt-ninety", "architectures": ["GPTNinety"]}')
    (tmp_path / "model.safetensors").write_bytes((family_folder("llama") / "model.safetensors").read_bytes())
    with pytest.raises(UnsupportedModelError, match="gpt-ninety"):
        Network(Checkpoint(tmp_path), torch.float32, CPU)


def test_config_and_weights_that_do_not_belong_together(family_folder: FolderOf, tmp_path: Path) -> None:
    text = (family_folder("llama") / "config.json").read_text()
    text = text.replace('"intermediate_size": 96', '"intermediate_size": 80')
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "model.safetensors").write_bytes((family_folder("llama") / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"gate_proj.*config and weights"):
        Network(Checkpoint(tmp_path), torch.float32, CPU)


def test_nan_weight_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tiny_models.save("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    network = Network(Checkpoint(tmp_path), torch.float32, CPU)
    with pytest.raises(DataError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"), network.loaded(network.blocks[1]):
        pass


@pytest.mark.parametrize("cut", [7, 1000])
def test_truncated_weights_are_named(cut: int, family_folder: FolderOf, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((family_folder("llama") / name).read_bytes())
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) - cut])
    with pytest.raises(CheckpointError, match=r"model.safetensors is truncated"):
        Checkpoint(tmp_path)
