"""Patterns of layers: shell patterns, and the regular expressions and the class name of other programs."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compressed_tensors.utils.match import is_match
from safetensors.torch import load_file
from torch import nn

import digits
import hesse
from helpers import IDS, WEIGHTS, CommandLine, compress, compress_module, write_ids
from hesse.errors import OptionError
from hesse.methods.patterns import matches

FolderOf = Callable[[str], Path]
NAMES = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.mlp.down_proj",
    "model.layers.1.mlp.down_proj",
    "model.layers.10.mlp.gate",
    "lm_head",
)
PATTERNS = (
    "re:.*down_proj$",
    "re:.*lm_head",
    "re:model\\.layers\\.1\\..*",
    "re:layers.*",  # the beginning of the whole name, which this is not
    "re:.*\\.(gate|q_proj)$",
    "re:.*mlp",
    "Linear",
    "lm_head",
    "model.layers.0.mlp.down_proj",
)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", NAMES)
def test_patterns_of_other_programs_mean_what_compressed_tensors_takes_them_for(pattern: str, name: str) -> None:
    assert matches(name, pattern) == is_match(name, nn.Linear(1, 1), pattern)


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("re:(", "the pattern 're:(' is not a valid regular expression (missing )"),
        ("re:(a|aa)+$", "the pattern 're:(a|aa)+$' takes more than 1 seconds for one name: simplify it"),
    ],
)
def test_a_regular_expression_that_cannot_be_used_is_named(pattern: str, reason: str) -> None:
    with pytest.raises(OptionError) as refused:
        matches("a" * 200 + "!", pattern)
    assert reason in str(refused.value)


def test_compress_leaves_what_a_regular_expression_names(
    half_folder: FolderOf, tmp_path: Path, hesse_command: CommandLine
) -> None:
    source, out = half_folder("llama"), tmp_path / "out"
    options = ("--method", "rtn", "--bits", "4", "--group-size", "32", "--data", write_ids(tmp_path / "ids.jsonl"))
    ran = hesse_command("compress", source, out, *options, "--ignore", "re:.*down_proj$", "--json")
    assert ran.code == 0, ran.stderr
    before, after = load_file(source / WEIGHTS), load_file(out / WEIGHTS)
    left = [name for name in before if name.endswith("down_proj.weight")]
    assert len(left) == 2
    assert all(torch.equal(before[name], after[name]) for name in left)
    changed = {layer["name"] for layer in json.loads(ran.stdout)["layers"]}
    assert len(changed) == 12
    refused = hesse_command("compress", source, tmp_path / "no", *options, "--ignore", "re:down_proj")
    assert "the pattern 're:down_proj' matches no layer of this model" in refused.error


def test_every_verb_that_takes_patterns_takes_regular_expressions(half_folder: FolderOf, tmp_path: Path) -> None:
    source, out = half_folder("llama"), tmp_path / "out"
    plan = hesse.plan(source, mean_bits=3.6, data=IDS, ignore=("re:.*down_proj$",)).report
    assert plan.recipe.rule_for("model.layers.0.mlp.down_proj") is None
    assert plan.recipe.rule_for("model.layers.0.mlp.up_proj") is not None
    compress(source, out, method="rtn", bits=2, group_size=32)
    repaired = hesse.repair(source, out, tmp_path / "adapter", rank=2, data=IDS, ignore=("re:.*down_proj$",)).report
    assert {layer.name.rpartition(".")[2] for layer in repaired.layers}.isdisjoint({"down_proj"})
    assert len(repaired.layers) == 12


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def test_modules_take_regular_expressions() -> None:
    data = digits.batches(samples=64)
    options = {"method": "rtn", "options": hesse.Options(bits=4, group_size=-1)}
    layers = compress_module(small_net(), data, ignore=("re:1$",), **options).report.layers
    assert [layer.name for layer in layers] == ["3"]
    choice = {"what": "weights", "method": "magnitude", "sparsity": 0.5}
    pruned = hesse.prune(small_net(), data=data, layers=("re:[13]$",), ignore=("re:3",), **choice)
    assert [name for name, weight in pruned.model.named_parameters() if (weight == 0).float().mean() > 0.4] == [
        "1.weight"
    ]
