"""Feed-forward layers with fewer hidden units: leverage, least squares, and the model as transformers loads it."""

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copyfile
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import hesse
import tiny_models
from helpers import IDS, CommandLine, dense_tensors, left_over, output, write_ids
from hesse.errors import ConditioningError, OptionError, UnsupportedModelError
from hesse.networks import feed_forward
from hesse.networks.families import EXPERT_LAYERS
from hesse.solvers.linear.nystroem import kept_units, nystroem_weight
from hesse.testing import normal

FolderOf = Callable[[str], Path]
PARTS = {
    "llama": ("model.layers.{}.mlp", ("gate_proj", "up_proj"), "down_proj", "intermediate_size"),
    "gemma2": ("model.layers.{}.mlp", ("gate_proj", "up_proj"), "down_proj", "intermediate_size"),
    "opt": ("model.decoder.layers.{}", ("fc1",), "fc2", "ffn_dim"),
    "gpt2": ("transformer.h.{}.mlp", ("c_fc",), "c_proj", "n_inner"),
    "falcon": ("transformer.h.{}.mlp", ("dense_h_to_4h",), "dense_4h_to_h", "ffn_hidden_size"),
    "phi3": ("model.layers.{}.mlp", ("gate_up_proj",), "down_proj", "intermediate_size"),
    "bert": ("encoder.layer.{}", ("intermediate.dense",), "output.dense", "intermediate_size"),
    "gpt-neox": ("gpt_neox.layers.{}.mlp", ("dense_h_to_4h",), "dense_4h_to_h", "intermediate_size"),
}


def narrowed(model: Path, out: Path, **options: Any) -> Any:
    return hesse.prune(model, out, what="hidden", **options)


def test_units_have_the_highest_ridge_leverage_and_it_sums_to_their_number() -> None:
    hidden = normal(0, 200, 12) @ torch.diag(torch.logspace(0, -2, 12).double()) @ normal(1, 12, 12)
    moment = hidden.T @ hidden / 200
    units = kept_units(moment, 5)
    ridges = torch.logspace(-9, 3, 4000).double()
    values = torch.linalg.eigvalsh(moment)
    ridge = ridges[(values / (values + ridges[:, None])).sum(1).sub(5).abs().argmin()]
    scores = (moment @ torch.linalg.inv(moment + ridge * torch.eye(12).double())).diagonal()
    assert units.tolist() == sorted(scores.topk(5).indices.tolist())


def test_what_reads_them_is_the_least_squares_fit() -> None:
    hidden, weight = normal(2, 200, 12), normal(3, 4, 12)
    units = torch.tensor([0, 3, 7, 8])
    found = nystroem_weight(weight, hidden.T @ hidden / 200, units)
    expected = torch.linalg.lstsq(hidden[:, units], hidden @ weight.T).solution.T
    torch.testing.assert_close(found, expected)
    copied = torch.cat([hidden[:, :6], 2 * hidden[:, :6]], 1)  # the other half says nothing new
    moment = copied.T @ copied / 200
    units = torch.arange(6, 12)
    torch.testing.assert_close(copied[:, units] @ nystroem_weight(weight, moment, units).T, copied @ weight.T)
    doubled = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7])  # some of them twice
    torch.testing.assert_close(copied[:, doubled] @ nystroem_weight(weight, moment, doubled).T, copied @ weight.T)
    with pytest.raises(ConditioningError, match="all inputs of this layer are zero"):
        nystroem_weight(weight, torch.zeros(12, 12), units)


@pytest.mark.parametrize("name", PARTS)
def test_a_narrow_model_is_the_dense_one_with_its_layers_cut_and_refitted(
    name: str, family_folder: FolderOf, tmp_path: Path
) -> None:
    prefix, makers, reader, setting = PARTS[name]
    source, out = family_folder(name), tmp_path / "out"
    report = narrowed(source, out, keep=0.5, data=IDS).report
    assert report.width_after == report.width_before // 2
    assert json.loads((out / "config.json").read_text())[setting] == report.width_after
    narrow, dense = tiny_models.load(name, out), tiny_models.load(name, source)
    assert sum(p.numel() for p in narrow.parameters()) == report.parameters_after < report.parameters_before
    held, whole = dense_tensors(out), dense_tensors(source)
    transposed = name == "gpt2"

    def units_of(layer: str) -> list[int]:
        small, large = (t[f"{layer}.weight"].T if transposed else t[f"{layer}.weight"] for t in (held, whole))
        found = [next(k for k, row in enumerate(large) if torch.equal(row, own)) for own in small]
        assert found[report.width_after :] in ([], [unit + report.width_before for unit in found[: report.width_after]])
        return found[: report.width_after]

    for index in range(2):  # the dense model with the units that stay, and the weights of the narrow one behind them
        path = prefix.format(index)
        stored = path if f"{path}.{reader}.weight" in held else path.removeprefix("transformer.")
        units = units_of(f"{stored}.{makers[0]}")
        assert all(units_of(f"{stored}.{maker}") == units for maker in makers)
        layer = dense.get_submodule(f"{path}.{reader}")
        inputs = seen_by(dense, layer)
        small = held[f"{stored}.{reader}.weight"]
        small = small.T if transposed else small
        expected = nystroem_weight(
            layer.weight.T if transposed else layer.weight, inputs.T @ inputs, torch.tensor(units)
        )
        torch.testing.assert_close(small, expected, rtol=2e-2, atol=2e-3)
        full = torch.zeros_like(layer.weight.T if transposed else layer.weight)
        full[:, units] = small
        layer.weight = nn.Parameter(full.T if transposed else full)
    torch.testing.assert_close(output(narrow), output(dense), rtol=1e-3, atol=1e-4)
    assert report.loss.measured > 0
    assert all(block.relative_error and 0 < block.relative_error < 1 for block in report.layers)


def row_of(matrix: Tensor, row: Tensor) -> int:
    return next(k for k, own in enumerate(matrix) if torch.equal(own, row))


def padded(small: dict[str, Tensor], large: dict[str, Tensor]) -> dict[str, Tensor]:
    """The narrow tensors in the shapes of the dense ones, with zeros where units are gone."""
    found = dict(small)
    for gate, up, down in EXPERT_LAYERS:
        for reader in [name for name in small if name.endswith(f".{down}.weight")]:
            names = [reader.replace(f".{down}.", f".{maker}.") for maker in (gate, up)]
            rows = [[row_of(large[each], own) for own in small[each]] for each in names]
            assert rows[0] == rows[1]
            for name in names:
                found[name] = torch.zeros_like(large[name])
                found[name][rows[0]] = small[name]
            found[reader] = torch.zeros_like(large[reader])
            found[reader][:, rows[0]] = small[reader]
    return found


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe", "qwen3-moe", "olmoe"])
@pytest.mark.parametrize("data", [IDS, [[5, 5], [5, 5]]], ids=["all reached", "few tokens"])
def test_each_expert_keeps_units_of_its_own(
    name: str, data: list[list[int]], family_folder: FolderOf, tmp_path: Path
) -> None:
    source, out, whole = family_folder(name), tmp_path / "out", tmp_path / "whole"
    report = narrowed(source, out, keep=0.5, data=data).report
    assert report.width_after == report.width_before // 2
    narrow = tiny_models.load(name, out)
    assert sum(p.numel() for p in narrow.parameters()) == report.parameters_after
    whole.mkdir()
    save_file(padded(dense_tensors(out), dense_tensors(source)), whole / "model.safetensors", {"format": "pt"})
    copyfile(source / "config.json", whole / "config.json")
    torch.testing.assert_close(output(narrow), output(tiny_models.load(name, whole)), rtol=1e-3, atol=1e-4)
    unreached = [block.name for block in report.layers if block.relative_error is None]
    assert [note.split(":")[0] for note in report.notes if "chosen by their weights" in note] == unreached
    assert (unreached != []) == (data != IDS)


def seen_by(model: nn.Module, layer: nn.Module) -> Tensor:
    """The inputs of a layer on the calibration tokens (tokens, in)."""
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    output(model, IDS)
    handle.remove()
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in seen])


def test_more_units_cost_less(family_folder: FolderOf, tmp_path: Path) -> None:
    costs = [
        narrowed(family_folder("llama"), tmp_path / str(k), keep=k, data=IDS).report.loss.measured for k in (0.25, 0.9)
    ]
    assert costs[1] < costs[0]


def test_what_cannot_be_narrowed_is_refused(family_folder: FolderOf, tmp_path: Path) -> None:
    for keep in (0.0, 1.0, -1.0, 2.0):
        with pytest.raises(OptionError, match="must be a share of the hidden units between 0 and 1"):
            narrowed(family_folder("llama"), tmp_path / "out", keep=keep, data=IDS)
    with pytest.raises(OptionError, match="leaves 96, a multiple of 8: give less"):
        narrowed(family_folder("llama"), tmp_path / "out", keep=0.99, data=IDS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feed_forward, "CONFIG_WIDTHS", ("hidden_size", "ffn_dim"))
        with pytest.raises(UnsupportedModelError, match="no settings for the width of all feed-forward layers"):
            narrowed(family_folder("llama"), tmp_path / "out", data=IDS)
        patch.setattr(feed_forward, "EXPERT_LAYERS", ())
        with pytest.raises(UnsupportedModelError, match=r"layers\.0 has no feed-forward layer of a known shape"):
            narrowed(family_folder("llama"), tmp_path / "out", data=IDS)
    assert left_over(tmp_path) == []


def test_the_command_line(family_folder: FolderOf, hesse_command: CommandLine, tmp_path: Path) -> None:
    ids = write_ids(tmp_path / "ids.jsonl")
    arguments = ("prune", family_folder("llama"), tmp_path / "out", "--what", "hidden", "--data", ids)
    report = json.loads(hesse_command(*arguments, "--json").stdout)
    assert report == json.loads((tmp_path / "out" / "hesse-report.json").read_text())
    ran = hesse_command(*arguments, "--overwrite")
    assert ran.code == 0
    assert "72 of 96 hidden units a block" in ran.stdout


def test_what_was_not_reached_is_printed(family_folder: FolderOf, hesse_command: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "few.jsonl").write_text('{"input_ids": [5, 5]}\n' * 2)
    ran = hesse_command(
        "prune", family_folder("mixtral"), tmp_path / "out", "--what", "hidden", "--data", tmp_path / "few.jsonl"
    )
    assert ran.code == 0
    assert "no sample reached it" in ran.stdout
