"""Whole blocks taken out: as transformers runs the model without them, scores by their definitions, and stand-ins."""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hesse
import tiny_models
from helpers import IDS, OTHER_IDS, CommandLine, change, dense_tensors, left_over, output, write_ids
from hesse.curvature import CrossEntropy
from hesse.curvature.losses import next_tokens
from hesse.curvature.objective import label_generator
from hesse.errors import CheckpointError, OptionError, UnsupportedModelError, VerificationError
from hesse.jobs.blocks_report import BlocksReport

DEPTH = 4
COUNTS = {"gpt2": "n_layer"}
LISTS = {"gpt2": "transformer.h", "opt": "model.decoder.layers", "gpt-neox": "gpt_neox.layers", "bert": "encoder.layer"}


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function from a family to the folder of a model of four blocks, of which the later ones do less."""
    made: dict[str, Path] = {}

    def folder(name: str, **changes: Any) -> Path:
        key = name + str(changes)
        if key not in made:
            made[key] = tmp_path_factory.mktemp(name)
            tiny_models.save(name, made[key], **{COUNTS.get(name, "num_hidden_layers"): DEPTH, **changes})
        return made[key]

    return folder


def drop(model: Path, out: Path, blocks: int | None = None, **options: Any) -> BlocksReport:
    """The report of so many blocks removed, of the four that there are."""
    keep = {} if blocks is None else {"keep": 1 - blocks / DEPTH}
    report: BlocksReport = hesse.prune(model, out, **{"data": IDS, "what": "blocks", **keep, **options}).report
    return report


def without(name: str, folder: Path, gone: Sequence[int]) -> nn.Module:
    """The model in transformers, with blocks deleted from its list."""
    model = tiny_models.load(name, folder, dtype=torch.float32)
    blocks = model.get_submodule(LISTS.get(name, "model.layers"))
    for number in sorted(gone, reverse=True):
        del blocks[number]
    return model


def divergence(name: str, folder: Path, gone: Sequence[int], ids: list[list[int]] = IDS) -> float:
    """KL(whole || without) in nats per token, in double precision."""
    whole, less = (output(without(name, folder, g), ids)[:, :-1].double().log_softmax(-1) for g in ((), gone))
    return float((whole.exp() * (whole - less)).sum(-1).mean())


@pytest.mark.parametrize("name", ["llama-tied", "qwen2", "gemma3", "gpt2", "opt", "gpt-neox", "mixtral", "bert"])
def test_what_is_written_is_the_model_without_its_blocks(name: str, deep: Any, tmp_path: Path) -> None:
    source = deep(name)
    report = drop(source, tmp_path / "out", blocks=2)
    gone = [dropped.block for dropped in report.removed]
    assert len(set(gone)) == 2
    assert sorted([*gone, *report.kept]) == list(range(DEPTH))
    written = tiny_models.load(name, tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(output(written), output(without(name, source, gone)))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config[COUNTS.get(name, "num_hidden_layers")] == 2
    if name == "gemma3":
        kinds = json.loads((source / "config.json").read_text())["layer_types"]
        assert config["layer_types"] == [kinds[number] for number in report.kept]
    held = dense_tensors(tmp_path / "out")
    assert report.parameters_after == sum(tensor.numel() for tensor in held.values())
    assert report.bytes_after < report.bytes_before


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_blocks_go_by_measured_loss_one_at_a_time(name: str, deep: Any, tmp_path: Path) -> None:
    source = deep(name)
    report = drop(source, tmp_path / "out", blocks=3)
    assert report.scores == pytest.approx([divergence(name, source, [k]) for k in range(DEPTH)], rel=1e-3)
    gone: list[int] = []
    for dropped in report.removed:
        costs = {k: divergence(name, source, [*gone, k]) for k in range(DEPTH) if k not in gone}
        assert dropped.block == min(costs, key=costs.__getitem__)
        assert dropped.measured == dropped.score == pytest.approx(costs[dropped.block], rel=1e-3)
        gone.append(dropped.block)
    assert report.loss.measured == pytest.approx(report.removed[-1].measured)  # ready tokens: none are held out
    assert not report.loss.held_out


def test_as_many_go_as_a_loss_allows(deep: Any, tmp_path: Path) -> None:
    source = deep("llama")
    steps = [dropped.measured for dropped in drop(source, tmp_path / "all", blocks=3).removed]
    assert steps == sorted(steps)
    report = drop(source, tmp_path / "some", loss=(steps[0] + steps[1]) / 2)
    assert [dropped.measured for dropped in report.removed] == pytest.approx(steps[:1])
    with pytest.raises(OptionError, match="no block can be removed: the cheapest costs"):
        drop(source, tmp_path / "none", loss=steps[0] / 2)
    assert left_over(tmp_path, "none") == []


def hidden_states(model: nn.Module, ids: list[list[int]]) -> list[Tensor]:
    """What enters each block, and what leaves the last one, with the graph that they came by."""
    blocks, seen = model.get_submodule("model.layers"), list[Tensor]()
    assert isinstance(blocks, nn.ModuleList)
    for block in blocks:
        block.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    blocks[-1].register_forward_hook(lambda _, given, result: seen.append(result))
    return seen


def test_cosines_and_quadratic_costs_are_what_they_say(deep: Any, tmp_path: Path) -> None:
    source = deep("llama")
    model = tiny_models.load("llama", source)
    seen = hidden_states(model, IDS)
    logits = model(input_ids=torch.tensor(IDS)).logits
    cosines = [1 - float(torch.cosine_similarity(x.detach(), y.detach(), dim=-1).mean()) for x, y in pairwise(seen)]
    found = drop(source, tmp_path / "cosine", method="cosine", blocks=2)
    assert found.scores == pytest.approx(cosines, rel=1e-4)
    assert [d.block for d in found.removed] == sorted(range(DEPTH), key=cosines.__getitem__)[:2]
    assert found.removed[1].measured == pytest.approx(divergence("llama", source, [d.block for d in found.removed]))

    loss, ids = CrossEntropy(), torch.tensor(IDS)
    labels = loss.sample_targets(logits, next_tokens(ids), label_generator(0))
    slopes = torch.autograd.grad(loss.terms(logits, labels).sum(), seen[1:])
    expected = [
        0.5 * float((slope * (after - before).detach()).sum(-1).square().sum()) / loss.count(labels)
        for (before, after), slope in zip(pairwise(seen), slopes, strict=True)
    ]
    found = drop(source, tmp_path / "quadratic", method="quadratic", blocks=1)
    assert found.scores == pytest.approx(expected, rel=1e-3)
    assert found.removed[0].block == expected.index(min(expected))


# Stand-ins


def test_a_block_that_is_another_with_its_outputs_scaled_is_found(deep: Any, tmp_path: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        """Block 3 becomes block 1 with a factor for each output, and hardly does anything, so that it goes first."""
        for name in [name for name in tensors if ".layers.1." in name and "proj" in name]:
            scale = 0.05 * (1 + torch.rand(len(tensors[name]), 1, generator=torch.Generator().manual_seed(3)))
            tensors[name.replace(".layers.1.", ".layers.3.")] = tensors[name] * scale

    (tmp_path / "edited").mkdir()
    source = change(tiny_models.save("llama", tmp_path / "edited", num_hidden_layers=DEPTH), edit)
    report = drop(source, tmp_path / "out", blocks=1, method="flexigpt", rank=2)
    (dropped,) = report.removed
    assert (dropped.block, dropped.donor) == (3, 1)
    assert dropped.relative_error == pytest.approx(0, abs=1e-6)
    assert report.loss.measured < 1e-6 < dropped.measured
    held = dense_tensors(tmp_path / "out")
    for name, tensor in dense_tensors(source).items():
        torch.testing.assert_close(held[name], tensor, rtol=1e-3, atol=1e-5)
    layers = [tensor.shape for name, tensor in held.items() if ".layers.3." in name and "proj" in name]
    stored = sum(2 * sum(shape) + shape[0] for shape in layers)
    assert report.parameters_after == report.parameters_before - sum(map(torch.Size.numel, layers)) + stored


def test_a_higher_rank_stands_in_better_and_little_is_as_good_as_none(deep: Any, tmp_path: Path) -> None:
    source = deep("llama")
    found = {rank: drop(source, tmp_path / str(rank), blocks=2, method="flexigpt", rank=rank) for rank in (1, 8, 31)}
    errors = [max(d.relative_error or 0.0 for d in report.removed) for report in found.values()]
    assert 1 > errors[0] > errors[1] > errors[2]
    assert found[31].loss.measured < found[8].loss.measured < drop(source, tmp_path / "gone", blocks=2).loss.measured
    model = tiny_models.load("llama", tmp_path / "31")
    assert len(model.model.layers) == DEPTH
    assert output(model).isfinite().all()


# What is refused


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "give one limit"),
        ({"keep": 0.5, "loss": 0.1}, "give one limit"),
        ({"keep": 1.0}, r"--keep is 1\.0"),
        ({"keep": 0.95}, r"--keep 0\.95 of 4 blocks leaves 4: at least one must stay, and one be removed"),
        ({"keep": 0.1}, r"--keep 0\.1 of 4 blocks leaves 0"),
        ({"loss": -0.1}, "--loss is -0.1"),
        ({"keep": 0.5, "method": "size"}, "no method 'size' that prunes blocks; there are drop-blocks, flexigpt"),
        ({"keep": 0.5, "method": "obs"}, "the score obs judges a group by what reads it, not blocks"),
        ({"keep": 0.5, "rank": 4}, "the method loss has no option 'rank'; it has keep, loss"),
        ({"keep": 0.5, "method": "flexigpt", "rank": 0}, "rank is 0"),
        ({"keep": 0.5, "method": "flexigpt", "rank": 32}, "k_proj: rank 32 is not below the smaller side"),
        ({"keep": 0.5, "what": "heads"}, "on disk blocks and hidden are pruned, not heads"),
        ({"keep": 0.5, "what": ["hidden", "heads"]}, "on disk blocks and hidden are pruned"),
        ({"keep": 0.5, "ignore": ["a"]}, "layers and ignore are for modules"),
    ],
)
def test_what_has_no_meaning_is_refused_by_name(options: dict[str, Any], said: str, deep: Any, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=said):
        drop(deep("llama"), tmp_path / "out", **options)
    assert left_over(tmp_path) == []


def test_blocks_that_are_what_they_are_by_their_numbers_are_refused(deep: Any, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="has decoder_sparse_step: the kinds of its blocks depend on their"):
        drop(deep("qwen2-moe", decoder_sparse_step=2), tmp_path / "out", blocks=1)
    (tmp_path / "by-place").mkdir()
    settings = {"n_layer": DEPTH, "scale_attn_by_inverse_layer_idx": True}

    def quieten(tensors: dict[str, Tensor]) -> None:
        """Block 0 goes first, so that all others move."""
        for name in [name for name in tensors if "h.0." in name and "c_proj" in name]:
            tensors[name] *= 1e-3

    by_place = change(tiny_models.save("gpt2", tmp_path / "by-place", **settings), quieten)
    with pytest.raises(VerificationError, match="the blocks of GPT2LMHeadModel do other things in other places"):
        drop(by_place, tmp_path / "out", blocks=1)
    hesse.compress(deep("llama"), tmp_path / "packed", method="rtn", data=IDS)
    with pytest.raises(CheckpointError, match="is already compressed"):
        drop(tmp_path / "packed", tmp_path / "out", blocks=1)
    assert left_over(tmp_path) == []


def test_blocks_that_the_config_names_by_number_keep_their_kind(deep: Any, tmp_path: Path) -> None:
    source = deep("qwen3-moe", mlp_only_layers=[1, 3])
    report = drop(source, tmp_path / "out", blocks=1)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["mlp_only_layers"] == [report.kept.index(number) for number in (1, 3) if number in report.kept]
    gone = [dropped.block for dropped in report.removed]
    written = tiny_models.load("qwen3-moe", tmp_path / "out")
    torch.testing.assert_close(output(written), output(without("qwen3-moe", source, gone)), rtol=1e-3, atol=1e-4)


def test_the_command_line(deep: Any, hesse_command: CommandLine, tmp_path: Path) -> None:
    ids = write_ids(tmp_path / "ids.jsonl")
    arguments = ("prune", deep("llama"), tmp_path / "out", "--what", "blocks", "--keep", "0.75", "--data", ids)
    ran = hesse_command(*arguments, "--json")
    report = json.loads(ran.stdout)
    assert report == json.loads((tmp_path / "out" / "hesse-report.json").read_text())
    found = hesse.evaluate(tmp_path / "out", reference=deep("llama"), data=OTHER_IDS).report
    assert found.kl is not None
    assert found.kl > 0
    ran = hesse_command(*arguments, "--overwrite", "--method", "flexigpt", "--rank", "4")
    assert ran.code == 0
    assert "made of" in ran.stdout
