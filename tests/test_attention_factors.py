"""What the attention's output feels of its layers: against dense Jacobians, and the method `aptq` on whole models."""

from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

import hesse
from helpers import IDS, compress, compress_module, dense_tensors, write_ids
from hesse.checkpoints.checkpoint import Checkpoint
from hesse.curvature import Gram, Kronecker
from hesse.errors import OptionError, UnsupportedModelError
from hesse.estimation.statistics import attention_factor as factors
from hesse.estimation.statistics.attention_factor import attention_factors, attention_modules, moments
from hesse.layerwise.layer_solver import LayerProblem, LayerSolver
from hesse.methods import Options, find_method
from hesse.networks.network import CheckpointNetwork, Layer
from hesse.passes.stream import start
from hesse.processes import ALONE
from hesse.testing import normal

FolderOf = Callable[[str], Path]
METHOD = {"method": "aptq", "bits": 3, "group_size": 32}


def signs(output: Tensor) -> Iterator[Tensor]:
    """Every probe of random signs that there is."""
    for each in product((-1.0, 1.0), repeat=output.numel()):
        yield torch.tensor(each, dtype=output.dtype).view(output.shape)


def test_it_is_what_dense_jacobians_give() -> None:
    """In the mean over all probes, to the float32 of Llama's softmax; the last layer's is the identity."""
    config = LlamaConfig(hidden_size=4, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=1)
    config._attn_implementation = "eager"
    module = LlamaAttention(config, 0).double().eval().requires_grad_(False)
    for seed, parameter in enumerate(module.parameters()):
        parameter.copy_(normal(seed, *parameter.shape))
    hidden = normal(9, 1, 2, 4)
    turns = LlamaRotaryEmbedding(config)(hidden, torch.arange(2)[None])
    mask = torch.zeros(1, 1, 2, 2, dtype=torch.float64).masked_fill(~torch.ones(2, 2).tril().bool(), -1e300)
    layers = [Layer(name, child) for name, child in module.named_modules() if isinstance(child, nn.Linear)]
    found = moments(lambda: module(hidden, turns, mask), layers, signs)
    assert set(found) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    for layer in layers:

        def from_output(output: Tensor, layer: Layer = layer) -> Tensor:
            hook = layer.module.register_forward_hook(lambda *_: output)
            result: Tensor = module(hidden, turns, mask)[0]
            hook.remove()
            return result

        output = layer.module(hidden if layer.name != "o_proj" else normal(3, 1, 2, 4))
        jacobian = torch.autograd.functional.jacobian(from_output, output)  # type: ignore[no-untyped-call]
        wide = jacobian.reshape(8, 2, output.shape[-1])
        total, positions = found[layer.name]
        assert positions == 2
        torch.testing.assert_close(total, torch.einsum("kti,ktj->ij", wide, wide), rtol=1e-5, atol=1e-6)
    assert torch.equal(found["o_proj"][0], 2 * torch.eye(4, dtype=torch.float64))


def test_random_probes_come_to_the_mean(family_folder: FolderOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """More probes change the factors of a model's block, and the same ones do not."""
    network = CheckpointNetwork(Checkpoint(family_folder("llama")), torch.float32, torch.device("cpu"))
    flows = start(network, torch.tensor(IDS).split(3))
    block = network.blocks[0]
    with network.loaded(block):
        found = attention_factors(flows, block, 0, ALONE)
        again = attention_factors(flows, block, 0, ALONE)
        monkeypatch.setattr(factors, "SAMPLES", 3)
        few = attention_factors(flows, block, 0, ALONE)
        assert block.layers[0].weight.requires_grad is False
    assert {name.rpartition(".")[2] for name in found} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    for name, factor in found.items():
        assert torch.equal(factor, again[name])
        assert torch.linalg.eigvalsh(factor.double()).min() > -1e-5 * factor.diagonal().max()
        if name.endswith("o_proj"):
            assert torch.equal(factor, torch.eye(len(factor)))
        else:
            assert not torch.equal(factor, few[name])
            assert (factor - few[name]).norm() < factor.norm()


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "mistral", "bert"])
def test_attention_is_found(name: str, family_folder: FolderOf) -> None:
    network = CheckpointNetwork(Checkpoint(family_folder(name)), torch.float32, torch.device("cpu"))
    flows = start(network, [torch.tensor(IDS)[:2]])
    block = network.blocks[0]
    with network.loaded(block):
        (inside,) = attention_modules(block).values()
        found = attention_factors(flows, block, 0, ALONE)
    assert set(found) == {layer.name for layer in inside} < {layer.name for layer in block.layers}


def test_layers_outside_attention_keep_their_gram() -> None:
    """And layers of one input with factors of their own, or none, do not get each other's."""
    (rule,) = find_method("aptq").recipe(Options(bits=3, group_size=-1)).rules
    gram, solver = Gram.from_inputs(normal(0, 64, 8).float()), LayerSolver()
    root = normal(1, 6, 6).float()
    for rows, factor in ((6, root @ root.T), (6, None), (4, None), (6, root.T @ root)):
        weight = normal(2, rows, 8).float()
        statistics = {"inputs": gram} | ({} if factor is None else {"attention factor": factor})
        problem = LayerProblem("a", weight, statistics, rule, rule.constraint.build())
        outputs = torch.ones(rows) if factor is None else factor
        kronecker = Kronecker(output_factor=outputs, input_factor=gram.second_moment).with_damped_factors(
            rule.solver.output_damping, rule.solver.damping
        )
        solving = rule.solver.build()
        wanted = solving.compute(solving.init(kronecker), weight, rule.constraint.build())
        solution = solver.solve(problem).solution.weight
        torch.testing.assert_close(solution, rule.constraint.build().decode(wanted))


def test_the_output_of_attention_is_nearer_than_with_equal_outputs(
    family_folder: FolderOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Changed weights, since the factors count; only those inside the attention of the first block."""
    source = family_folder("llama")
    compress(source, tmp_path / "aptq", **METHOD)
    monkeypatch.setattr("hesse.estimation.statistics.attention_factor.attention_factors", lambda *_: {})
    compress(source, tmp_path / "equal", **METHOD)
    one, other = dense_tensors(tmp_path / "aptq"), dense_tensors(tmp_path / "equal")
    changed = {name for name in one if "layers.0." in name and not torch.equal(one[name], other[name])}
    assert {"model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.v_proj.weight"} <= changed


def test_refusals_come_before_any_work(half_folder: FolderOf, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="has no attention with layers"):
        compress(half_folder("falcon-alibi"), tmp_path / "out", **METHOD)
    with pytest.raises(UnsupportedModelError, match="has no attention with layers"):
        compress(half_folder("llama"), tmp_path / "out", ignore=["self_attn.*"], **METHOD)
    hesse.estimate(half_folder("llama"), tmp_path / "statistics", data=write_ids(tmp_path / "ids.jsonl"))
    with pytest.raises(OptionError, match="--statistics holds no attention factor"):
        compress(half_folder("llama"), tmp_path / "out", statistics=tmp_path / "statistics", **METHOD)
    with pytest.raises(OptionError, match="attention factor is of the attention of a transformers language model"):
        compress_module(nn.Sequential(nn.Linear(32, 32)), [], method="aptq")
    assert {path.name for path in tmp_path.iterdir()} == {"statistics", "ids.jsonl"}


def test_an_output_without_a_slope_is_refused() -> None:
    layer = Layer("a", nn.Linear(3, 3))
    with pytest.raises(UnsupportedModelError, match="differentiable"):
        moments(lambda: layer.module(torch.ones(2, 3)).detach(), [layer], lambda output: [output])
