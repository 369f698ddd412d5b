"""Tensors that pass between blocks beside the hidden states: forward, backward, and after a resume."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

import test_resume
from helpers import compress
from hesse.checkpoints.checkpoint import Checkpoint
from hesse.checkpoints.tensor_store import InMemory
from hesse.networks.network import CheckpointNetwork, each_loaded
from hesse.passes.backward import BackwardPass, BackwardState, layer_part
from hesse.passes.block_state import BlockState
from hesse.passes.stream import StreamBatch, advance, finish, start

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import zoo_models

IDS = torch.tensor(zoo_models.random_ids(4, 24))
# The last three blocks read keys and values of the third, which is of full attention, or the second.
SHARING = {
    "vocab_size": 512,
    "vocab_size_per_layer_input": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "hidden_size_per_layer_input": 16,
    "num_hidden_layers": 6,
    "num_kv_shared_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gemma4": ("Gemma4ForCausalLM", "Gemma4TextConfig", {"global_head_dim": 16}),
    "gemma3n": (
        "Gemma3nForCausalLM",
        "Gemma3nTextConfig",
        {"activation_sparsity_pattern": [0.5, *[0.0] * 5], "laurel_rank": 8, "altup_num_inputs": 2},
    ),
}
# Top-k indices of an indexer, several streams of hidden states, routers' states, lists, and blocks that are not called.
OTHERS = (
    *("causal/glm_moe_dsa", "causal/deepseek_v32", "causal/hy_v4", "causal/deepseek_v4", "causal/minimax"),
    *("causal/cpmant", "causal/openai-gpt", "image-text/mistral_large4", "image-text/mllama"),
)
Built = tuple[PreTrainedModel, Path]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Built]:
    """Return a function that builds and saves a tiny model."""
    known: dict[str, Built] = {}

    def build(name: str) -> Built:
        if name not in known:
            if name in GEMMA:
                cls, config, settings = GEMMA[name]
                made = getattr(transformers, config)(**SHARING, **settings)
                model = zoo_models.build(getattr(transformers, cls), made)
            else:
                group, model_type = name.split("/")
                cls = zoo_models.groups()[group][model_type]
                model = zoo_models.build(zoo_models.model_class(cls), zoo_models.shrink(model_type))
            folder = tmp_path_factory.mktemp(name.replace("/", "-"))
            model.save_pretrained(folder)
            known[name] = model, folder
        return known[name]

    return build


def walked(folder: Path) -> tuple[CheckpointNetwork, StreamBatch, list[list[BlockState]]]:
    """Return a folder's network, a batch behind all its blocks, and the states before each."""
    network = CheckpointNetwork(Checkpoint(folder), torch.float32, torch.device("cpu"))
    (flow,), inputs = start(network, [IDS]), []
    for index, block in each_loaded(network):
        inputs.append([flow.waiting])
        advance([flow], block.module, index)
    return network, flow, inputs


@pytest.mark.parametrize("name", [*GEMMA, *OTHERS])
def test_the_stream_equals_transformers(name: str, built: Callable[[str], Built]) -> None:
    model, folder = built(name)
    network, flow, _ = walked(folder)
    with network.surroundings() as outside, torch.no_grad():
        result = finish(network, outside, flow)
    torch.testing.assert_close(result, zoo_models.output(model, {"input_ids": IDS}), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", [*GEMMA, "causal/glm_moe_dsa"])
def test_gradients_flow_through_what_blocks_share(name: str, built: Callable[[str], Built]) -> None:
    """Every layer's output gradient is that of the whole model, whose hooks autograd fills."""
    model, folder = built(name)
    network, flow, inputs = walked(folder)
    slope = torch.randn(flow.hidden.shape, generator=torch.Generator().manual_seed(1))
    expected = gradients_in_memory(model, network, slope)
    state = BackwardState(len(network.blocks), 1.0, [BlockState(InMemory(slope))])
    walk = BackwardPass(network, [flow], inputs, seed=0, state=state)
    compared = set()
    for block, recorded in walk:
        (batch,) = recorded
        for layer in block.layers:
            rows = batch.rows(layer_part(layer))
            if rows is None or layer.name not in expected:
                continue
            if expected[layer.name].numel() != rows.gradients.numel():
                continue  # several calls, of which autograd's hooks here hold the last
            wanted = expected[layer.name].reshape(rows.gradients.shape)
            torch.testing.assert_close(rows.gradients, wanted, atol=1e-4, rtol=1e-4)
            compared.add(layer.name)
    assert compared >= {name for name in expected if name.endswith(("k_proj", "v_proj", "down_proj", "o_proj"))}
    if name in GEMMA:  # a producer's gradient comes from the blocks that read it, too
        assert expected[f"{network.blocks[2].name}.self_attn.v_proj"].norm() > 0


def gradients_in_memory(model: PreTrainedModel, network: CheckpointNetwork, slope: Tensor) -> dict[str, Tensor]:
    """Return the gradient of Σ slope · (output of the last block) at the output of each layer, by autograd alone."""
    outputs: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        def hook(module: Any, arguments: Any, output: Tensor) -> None:
            if output.requires_grad:
                outputs[name] = output

        return hook

    ends: list[Tensor] = []

    def end(module: Any, arguments: Any, output: Any) -> None:
        ends.append(output[0] if isinstance(output, tuple) else output)

    modules = dict(model.named_modules())
    names = [layer.name for layer in network.layers if layer.name in modules]  # experts are in one tensor there
    hooks = [modules[name].register_forward_hook(note(name)) for name in names]
    hooks.append(model.get_submodule(network.blocks[-1].name).register_forward_hook(end))
    model(input_ids=IDS, use_cache=False)
    for hook in hooks:
        hook.remove()
    slopes = torch.autograd.grad(ends[0], list(outputs.values()), slope, allow_unused=True)
    return {name: g for name, g in zip(outputs, slopes, strict=True) if g is not None}


def test_the_output_factor_of_a_shared_value_projection_has_the_whole_trace(built: Callable[[str], Built]) -> None:
    model, folder = built("gemma4")
    network, flow, inputs = walked(folder)
    slope = torch.randn(flow.hidden.shape, generator=torch.Generator().manual_seed(1))
    expected = gradients_in_memory(model, network, slope)
    without = [[BlockState(state.hidden, state.shared)] for (state,) in inputs]
    state = BackwardState(len(network.blocks), 1.0, [BlockState(InMemory(slope))])
    traces = {}
    for block, recorded in BackwardPass(network, [flow], without, seed=0, state=state):
        (batch,) = recorded
        for layer in block.layers:
            if layer.name.endswith("v_proj") and (rows := batch.rows(layer_part(layer))) is not None:
                traces[layer.name] = float(rows.gradients.square().sum())
    wanted = {name: float(g.square().sum()) for name, g in expected.items() if name.endswith("v_proj")}
    assert traces == pytest.approx(wanted, rel=1e-4)
    assert len(traces) == 3  # the other blocks have none of their own


@pytest.mark.parametrize("method", ["kronecker", "rtn"])
def test_a_killed_run_goes_on_to_the_same_bytes(method: str, built: Callable[[str], Built], tmp_path: Path) -> None:
    _, folder = built("gemma4")
    compress(folder, tmp_path / "undisturbed", **test_resume.settings(method))
    deaths = 0
    while not test_resume.run(folder, tmp_path / "out", method, die_after=4):
        deaths += 1
        assert deaths < 40
    assert deaths > 2
    assert test_resume.files(tmp_path / "out") == test_resume.files(tmp_path / "undisturbed")


def test_a_method_that_takes_gradients_inside_blocks_reads_what_blocks_share(
    built: Callable[[str], Built], tmp_path: Path
) -> None:
    report = compress(built("gemma4")[1], tmp_path / "out", method="aptq", bits=4, group_size=32)
    assert report.loss.measured < 1


def test_blocks_that_are_called_several_times_are_refused_in_one_line(tmp_path: Path) -> None:
    config = transformers.AlbertConfig(
        vocab_size=512, embedding_size=32, hidden_size=64, num_attention_heads=4, intermediate_size=64
    )
    zoo_models.build(transformers.AlbertModel, config).save_pretrained(tmp_path / "model")
    with pytest.raises(Exception, match="AlbertModel calls its blocks several times"):
        compress(tmp_path / "model", tmp_path / "out", method="rtn")
