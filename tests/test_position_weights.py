"""Positions weighed by the attention that they receive: against eager attention, and RSQ against its definition."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import hesse
from helpers import IDS, compress, dense_tensors, write_ids
from hesse.checkpoints.checkpoint import Checkpoint
from hesse.curvature import Gram
from hesse.errors import OptionError, UnsupportedModelError
from hesse.estimation.calibrated import calibrated
from hesse.estimation.statistics import weighted_inputs as weighing
from hesse.estimation.statistics.weighted_inputs import LEAST, in_range, position_weights
from hesse.methods import Recipe, Rule
from hesse.methods.constraint_options import ConstraintOptions, GridOptions
from hesse.methods.solver_options import SolverOptions
from hesse.networks.attention import attention_per_key
from hesse.networks.network import CheckpointNetwork
from hesse.passes.stream import advance, start
from hesse.solvers import ErrorFeedback, solve
from hesse.testing import normal

FolderOf = Callable[[str], Path]
RULE = Rule(
    curvature="weighted_gram",
    constraint=ConstraintOptions(grid=GridOptions(bits=3, group_size=32)),
    solver=SolverOptions(name="error_feedback"),
)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "opt", "qwen2-moe"])
def test_it_is_what_eager_attention_gives(name: str, family_folder: FolderOf) -> None:
    folder = family_folder(name)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    ids = torch.tensor(IDS)[:3]
    with torch.no_grad():
        wanted = model(ids, output_attentions=True).attentions
    network = CheckpointNetwork(Checkpoint(folder), torch.float32, torch.device("cpu"))
    flows = start(network, [ids[:2], ids[2:]])
    for index, block in enumerate(network.blocks):
        with network.loaded(block) as module:
            found = position_weights(flows, block, index)
            advance(flows, module, index)
        assert found is not None
        torch.testing.assert_close(torch.cat(found), in_range(wanted[index].sum((1, 2))), atol=1e-4, rtol=1e-4)
    assert network.model.config._attn_implementation == "sdpa"


def test_masks_are_kept() -> None:
    query, key = normal(0, 2, 4, 5, 3).float(), normal(1, 2, 2, 5, 3).float()
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    found = attention_per_key(query, key, None, None, True)
    added = torch.zeros(1, 1, 5, 5).masked_fill(~causal, -torch.inf)
    for mask in (causal[None, None], added, causal.expand(2, 4, 5, 5)):
        torch.testing.assert_close(attention_per_key(query, key, mask, None, True), found)
    shares = (query @ key.repeat_interleave(2, 1).transpose(2, 3) / 3**0.5).masked_fill(~causal, -torch.inf).softmax(-1)
    torch.testing.assert_close(found, shares.sum((1, 2)))
    torch.testing.assert_close(found.sum(1), torch.full((2,), 4.0 * 5))  # each query of each head gives one in all
    assert attention_per_key(query, key, None, None, False).sum() == pytest.approx(40)


def test_weights_lie_in_their_range_sample_by_sample() -> None:
    weights = in_range(torch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, 5.0]]))
    torch.testing.assert_close(weights, torch.tensor([[LEAST, 1.0, (1 + LEAST) / 2], [1.0, 1.0, 1.0]]))


def test_the_gram_is_of_weighted_positions(family_folder: FolderOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer's, with the weights of the flow that its inputs came with; a layer without inputs of its own too."""
    network = CheckpointNetwork(Checkpoint(family_folder("llama")), torch.float32, torch.device("cpu"))
    flows = start(network, torch.tensor(IDS).split(3))
    block, seen, found = network.blocks[0], dict[str, list[Tensor]](), dict[str, tuple[Gram, Gram]]()
    weights = [normal(seed, *flow.ids.shape).square().float() for seed, flow in enumerate(flows)]
    monkeypatch.setattr(weighing, "position_weights", lambda batches, block, index: weights)
    needs = {layer.name: ("inputs", "weighted inputs") for layer in block.layers}

    def note(name: str, module: object, arguments: tuple[Tensor, ...]) -> None:
        seen.setdefault(name, []).append(arguments[0])

    for layer in block.layers:
        layer.module.register_forward_pre_hook(partial(note, layer.name))
    r = torch.cat([each.flatten() for each in weights])
    for reached, layer, statistics in calibrated(network, flows, needs):
        if reached is block:
            found[layer.name] = (statistics.gram, statistics["weighted inputs"])
    for name, (gram, weighted) in found.items():
        rows = torch.cat([each.flatten(0, -2) for each in seen[name][: len(flows)]])
        torch.testing.assert_close(gram.second_moment, rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)
        wanted = rows.T @ (r[:, None] * rows) / len(rows)
        torch.testing.assert_close(weighted.second_moment, wanted, rtol=1e-4, atol=1e-5)
        assert weighted.tokens == len(rows)
    assert len({id(gram) for gram, _ in found.values()}) == 4


def test_the_layers_are_gptqs_under_the_weighted_gram(family_folder: FolderOf, tmp_path: Path) -> None:
    """The first layer of a model, whose inputs no change before it has touched."""
    source, name = family_folder("llama"), "model.layers.0.self_attn.q_proj"
    compress(source, tmp_path / "out", recipe=Recipe(rules=(RULE,)), data=IDS)
    network = CheckpointNetwork(Checkpoint(source), torch.float32, torch.device("cpu"))
    flows = start(network, [torch.tensor(IDS)])
    with network.loaded(network.blocks[0]) as module:
        found = position_weights(flows, network.blocks[0], 0)
        inputs = module.input_layernorm(flows[0].hidden).flatten(0, 1).detach()
        weight = network.blocks[0].layers[0].weight.detach()
    assert found is not None
    r = torch.cat(found).flatten()
    gram = Gram(second_moment=inputs.T @ (r[:, None] * inputs) / len(r), tokens=len(r)).damped(0.01)
    wanted = solve(weight, gram, RULE.constraint.build(), ErrorFeedback())
    changed = dense_tensors(tmp_path / "out")[f"{name}.weight"].float()
    assert (changed - wanted.weight).abs().gt(1e-6).float().mean() < 0.01


def test_equal_weights_are_gptq(family_folder: FolderOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weighing, "in_range", torch.ones_like)
    compress(family_folder("llama"), tmp_path / "rsq", recipe=Recipe(rules=(RULE,)))
    gptq = RULE.model_copy(update={"curvature": "gram"})
    compress(family_folder("llama"), tmp_path / "gptq", recipe=Recipe(rules=(gptq,)))
    one, other = dense_tensors(tmp_path / "rsq"), dense_tensors(tmp_path / "gptq")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_positions_that_reach_an_expert_are_equals_and_it_is_said(half_folder: FolderOf, tmp_path: Path) -> None:
    report = compress(half_folder("mixtral"), tmp_path / "out", recipe=Recipe(rules=(RULE,)))
    said = {note.split(":")[0] for note in report.notes if "how much attention its positions receive" in note}
    assert said == {layer.name for layer in report.layers if ".experts." in layer.name and layer.tokens}


def test_refusals_come_before_any_work(half_folder: FolderOf, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"the attention of .* cannot be observed"):
        compress(half_folder("falcon-alibi"), tmp_path / "out", recipe=Recipe(rules=(RULE,)))
    hesse.estimate(half_folder("llama"), tmp_path / "statistics", data=write_ids(tmp_path / "ids.jsonl"))
    with pytest.raises(OptionError, match="--statistics holds no weighted inputs"):
        compress(
            half_folder("llama"), tmp_path / "out", recipe=Recipe(rules=(RULE,)), statistics=tmp_path / "statistics"
        )
    assert {path.name for path in tmp_path.iterdir()} == {"statistics", "ids.jsonl"}
