"""The walk over blocks against plain transformers, for every family."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

import tiny_models
from hesse.checkpoints.checkpoint import Checkpoint
from hesse.errors import CheckpointError, DataError, UnsupportedModelError
from hesse.estimation.calibrated import calibrated, calibrated_blocks
from hesse.networks.network import Block, CheckpointNetwork, Layer
from hesse.passes.layer_stops import layer_stops
from hesse.passes.stream import StreamBatch, advance, finish, start

FolderOf = Callable[[str], Path]
CPU = torch.device("cpu")


def reference(name: str, folder: Path, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        model = tiny_models.load(name, folder)
        if name in tiny_models.ENCODERS:
            return model.base_model(input_ids=ids).last_hidden_state
        return model(input_ids=ids).logits


def runs(batches: list[StreamBatch], block: Block, index: int) -> list[Callable[[], None]]:
    """What takes each batch through a block."""

    def run(batch: StreamBatch) -> None:
        batch.pass_block(block.module, index)

    return [partial(run, batch) for batch in batches]


@pytest.mark.parametrize("name", tiny_models.FAMILIES)
def test_stream_equals_transformers(name: str, family_folder: FolderOf) -> None:
    folder = family_folder(name)
    ids = torch.tensor(tiny_models.random_ids(5, 24))
    network = CheckpointNetwork(Checkpoint(folder), torch.float32, CPU)
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
    network = CheckpointNetwork(Checkpoint(folder), torch.float32, CPU)
    flows = start(network, ids.split(1))
    seen: dict[str, int] = {}
    order: list[str] = []
    for index, block in enumerate(network.blocks):
        with network.loaded(block):

            def collect(layer: Layer, number: int, inputs: torch.Tensor) -> None:
                seen[layer.name] = seen.get(layer.name, 0) + inputs.reshape(-1, inputs.shape[-1]).shape[0]

            current = [layer.name for layer in layer_stops(runs(flows, block, index), block, collect)]
            order += current
            assert set(current) == {layer.name for layer in block.layers}
    assert len(order) == len(set(order)) == len(network.layers)
    for layer, tokens in seen.items():
        assert tokens <= ids.numel() or "experts" in layer
        if "expert" not in layer:
            assert tokens == ids.numel()
    with network.surroundings() as model, torch.no_grad():
        streamed = torch.cat([finish(network, model, flow) for flow in flows])
    torch.testing.assert_close(streamed, reference(name, folder, ids), atol=1e-5, rtol=1e-5)


def test_layers_after_a_changed_layer_see_the_change(family_folder: FolderOf) -> None:
    network = CheckpointNetwork(Checkpoint(family_folder("llama")), torch.float32, CPU)
    flows = start(network, [torch.tensor(tiny_models.random_ids(2, 16))])
    inputs: dict[str, torch.Tensor] = {}
    block, collected_at = network.blocks[0], dict[str, str]()
    with network.loaded(block):
        for layer in layer_stops(runs(flows, block, 0), block, lambda layer, number, x: inputs.update({layer.name: x})):
            layer.replace(torch.zeros_like(layer.weight))
            collected_at[layer.name] = list(inputs)[-1]
    assert not inputs["model.layers.0.self_attn.o_proj"].any()
    assert "model.layers.0.self_attn.k_proj" not in inputs  # it shares the queries' inputs
    assert collected_at["model.layers.0.self_attn.k_proj"] == "model.layers.0.self_attn.q_proj"


def test_a_consumer_that_stops_early_leaves_no_hooks(family_folder: FolderOf) -> None:
    network = CheckpointNetwork(Checkpoint(family_folder("llama")), torch.float32, CPU)
    flows = start(network, torch.tensor(tiny_models.random_ids(2, 16)).split(1))
    needs = {layer.name: ("inputs",) for layer in network.layers}
    for block, layers in calibrated_blocks(network, flows, needs):
        for _layer, statistics in layers:
            assert statistics.gram.tokens == 32
            assert block.layers[0].module._forward_pre_hooks
            break
        break
    assert not any(layer.module._forward_pre_hooks for layer in network.layers)
    assert all(parameter.is_meta for parameter in network.model.parameters())


def test_layers_that_are_not_asked_for_are_passed(family_folder: FolderOf) -> None:
    """A consumer that looks at no layer leaves the batches where a plain pass does; layers with one input share it."""
    folder = family_folder("llama")
    ids = torch.tensor(tiny_models.random_ids(2, 16))
    network = CheckpointNetwork(Checkpoint(folder), torch.float32, CPU)
    flows, needs = start(network, [ids]), {layer.name: ("inputs",) for layer in network.layers}
    assert [block for block, _ in calibrated_blocks(network, flows, {})] == network.blocks
    with network.surroundings() as model, torch.no_grad():
        torch.testing.assert_close(finish(network, model, flows[0]), reference("llama", folder, ids))
    grams = {layer.name: statistics.gram for _, layer, statistics in calibrated(network, start(network, [ids]), needs)}
    assert len(grams) == len(network.layers)
    assert grams["model.layers.0.self_attn.q_proj"] is grams["model.layers.0.self_attn.k_proj"]
    assert grams["model.layers.0.self_attn.q_proj"] is not grams["model.layers.0.self_attn.o_proj"]


def test_networks_of_the_same_modules_do_not_hold_weights_together(family_folder: FolderOf) -> None:
    network = CheckpointNetwork(Checkpoint(family_folder("llama")), torch.float32, CPU)
    other, block = network.in_dtype(torch.bfloat16), network.blocks[0]
    with network.loaded(block), pytest.raises(RuntimeError, match=r"cannot be loaded as torch\.bfloat16"):
        other.loaded(block).__enter__()
    with network.loaded(block):
        pass
    with other.loaded(block) as module:
        assert next(module.parameters()).dtype == torch.bfloat16


def test_equal_arguments_of_blocks_are_kept_once(family_folder: FolderOf) -> None:
    network = CheckpointNetwork(Checkpoint(family_folder("gemma3")), torch.float32, CPU)
    flows = start(network, torch.tensor(tiny_models.random_ids(4, 16)).split(1))
    first = flows[0].calls[0]["position_embeddings"][0]
    assert all(flow.calls[0]["position_embeddings"][0] is first for flow in flows)


def test_unknown_architecture_is_named(family_folder: FolderOf, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt-ninety", "architectures": ["GPTNinety"]}')
    (tmp_path / "model.safetensors").write_bytes((family_folder("llama") / "model.safetensors").read_bytes())
    with pytest.raises(UnsupportedModelError, match="gpt-ninety"):
        CheckpointNetwork(Checkpoint(tmp_path), torch.float32, CPU)


def test_config_and_weights_that_do_not_belong_together(family_folder: FolderOf, tmp_path: Path) -> None:
    text = (family_folder("llama") / "config.json").read_text()
    text = text.replace('"intermediate_size": 96', '"intermediate_size": 80')
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "model.safetensors").write_bytes((family_folder("llama") / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"gate_proj.*config and weights"):
        CheckpointNetwork(Checkpoint(tmp_path), torch.float32, CPU)


def test_nan_weight_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tiny_models.save("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    network = CheckpointNetwork(Checkpoint(tmp_path), torch.float32, CPU)
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
