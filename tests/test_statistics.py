"""Curvature that is estimated once, and used for compressing without calibration."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import hesse
import tiny_models
from helpers import IDS, OTHER_IDS, WEIGHTS, CommandLine, change, compress, dense_tensors, left_over, write_ids
from hesse.checkpoints.checkpoint import Checkpoint
from hesse.errors import CheckpointError, DataError, OptionError, OutputError
from hesse.estimation import Statistics
from hesse.networks.network import CheckpointNetwork

FolderOf = Callable[[str], Path]
CPU = torch.device("cpu")


@pytest.fixture
def estimated(half_folder: FolderOf, tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """A tiny model's folder, and the statistics of it."""

    def run(name: str = "llama", **options: Any) -> tuple[Path, Path]:
        source = half_folder(name)
        data = write_ids(tmp_path / "ids.jsonl")
        hesse.estimate(source, tmp_path / "statistics", **{"data": data, **options})
        return source, tmp_path / "statistics"

    return run


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "mixtral", "bert"])
def test_grams_are_of_the_dense_models_inputs(name: str, estimated: Callable[..., tuple[Path, Path]]) -> None:
    source, folder = estimated(name)
    model, statistics = tiny_models.load(name, source), Statistics(folder)
    network = CheckpointNetwork(Checkpoint(source), torch.float32, CPU)
    seen: dict[str, list[Tensor]] = {}
    for layer in network.layers:
        try:
            module = model.get_submodule(layer.name)
        except AttributeError:  # transformers fuses experts
            continue
        module.register_forward_pre_hook(lambda _, a, key=layer.name: seen.setdefault(key, []).append(a[0]))
    with torch.no_grad():
        model(input_ids=torch.tensor(IDS))
    assert seen
    for key, inputs in seen.items():
        rows = torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs]).float()
        gram = statistics.gram(key, CPU)
        assert gram is not None
        assert gram.tokens == len(rows)
        torch.testing.assert_close(gram.second_moment, rows.T @ rows / len(rows), rtol=0.02, atol=1e-3)


def test_layers_with_one_input_share_one_gram(estimated: Callable[..., tuple[Path, Path]]) -> None:
    _, folder = estimated()
    statistics = Statistics(folder)
    layer = "model.layers.0.self_attn.{}_proj".format
    assert statistics.gram(layer("q"), CPU) is statistics.gram(layer("v"), CPU)
    assert statistics.gram(layer("q"), CPU) is not statistics.gram(layer("o"), CPU)
    assert len(list(folder.glob("gram-*"))) == 8  # 2 blocks of: attention's input, its output, and the same of the MLP


def test_sensitivities_are_those_of_a_whole_run(estimated: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    source, folder = estimated()
    whole = compress(source, tmp_path / "whole", bits=4, group_size=32)
    quick = compress(source, tmp_path / "quick", bits=4, group_size=32, statistics=folder, data=None)
    first = "model.layers.0.self_attn.q_proj"  # its inputs are the dense model's in both runs
    ours, theirs = (next(x for x in r.layers if x.name == first) for r in (quick, whole))
    assert ours == theirs
    weights = (dense_tensors(tmp_path / run)[f"{first}.weight"] for run in ("quick", "whole"))
    assert torch.equal(*weights)
    assert "calibrate" not in quick.seconds
    assert 1 / 3 < quick.loss.predicted / quick.loss.measured < 3
    assert quick.loss.measured < 1.5 * whole.loss.measured


@pytest.mark.parametrize("name", ["opt", "gpt2", "mixtral", "bert"])
def test_other_families(name: str, estimated: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    source, folder = estimated(name)
    report = compress(source, tmp_path / "out", bits=4, group_size=32, statistics=folder, data=None)
    assert 1 / 4 < report.loss.predicted / report.loss.measured < 3


@pytest.mark.parametrize("method", ["rtn", "wanda", "sparsegpt", "activation-svd"])
def test_every_scheme_from_one_estimate(
    method: str, estimated: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    source, folder = estimated()
    options = {"rank": 8} if method == "activation-svd" else {}
    report = compress(source, tmp_path / "out", method=method, statistics=folder, data=None, **options)
    assert report.loss.measured > 0


def test_text_is_held_out_for_the_check(tmp_path: Path) -> None:
    hesse.estimate("default", tmp_path / "statistics", samples=4, length=64)
    options = hesse.Options(bits=4, group_size=64)
    statistics = tmp_path / "statistics"
    report = hesse.compress(
        "default", tmp_path / "out", options=options, statistics=statistics, samples=99, seed=5
    ).report
    assert report.loss.held_out
    assert report.calibration["seed"] == 0
    other = tmp_path / "other.txt"
    other.write_text("def f(x):\n    return x\n" * 2000)
    report = hesse.compress(
        "default", tmp_path / "again", options=options, statistics=statistics, data=other, length=64
    ).report
    assert report.calibration["source"] == str(other)
    assert report.loss.held_out


def test_on_the_command_line(half_folder: FolderOf, hesse_command: CommandLine, tmp_path: Path) -> None:
    source, data = half_folder("llama"), write_ids(tmp_path / "ids.jsonl")
    ran = hesse_command("estimate", source, tmp_path / "statistics", "--data", data)
    assert ran.code == 0
    assert "gram of 14 layers from 256 tokens" in ran.stdout
    assert "--statistics" in ran.stdout
    ran = hesse_command("estimate", source, tmp_path / "statistics", "--data", data, "--overwrite", "--json")
    content = json.loads(ran.stdout)
    assert content == json.loads((tmp_path / "statistics" / "statistics.json").read_text())
    assert {"total", "read", "probe", "calibrate", "estimate", "write"} == content["seconds"].keys()
    ran = hesse_command(
        "compress",
        source,
        tmp_path / "out",
        "--statistics",
        tmp_path / "statistics",
        "--bits",
        "4",
        "--group-size",
        "32",
    )
    assert ran.code == 0
    assert (tmp_path / "out" / WEIGHTS).is_file()


def test_kronecker_and_fisher_are_kept_beside_the_gram(
    estimated: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    source, folder = estimated(curvatures=("gram", "kronecker", "fisher"))
    statistics, network = Statistics(folder), CheckpointNetwork(Checkpoint(source), torch.float32, CPU)
    for layer in network.layers:
        kronecker, fisher = statistics.kronecker(layer.name, CPU), statistics.fisher(layer.name, CPU)
        assert kronecker is not None
        assert fisher is not None
        assert kronecker.shape == fisher.shape == layer.module.weight.shape
        assert str(kronecker.origin) == "sampled Fisher per position in nats per token"
        assert str(fisher.origin) == "sampled Fisher per sample in nats per token"
        assert 1 / 5 < kronecker.trace() / fisher.trace() < 5  # positions are not independent
        torch.testing.assert_close(kronecker.output_factor.diagonal(), statistics.output_factors[layer.name])
    report = compress(source, tmp_path / "out", bits=4, group_size=32, statistics=folder, data=None)
    assert 1 / 4 < report.loss.predicted / report.loss.measured < 3


@pytest.mark.parametrize("kind", ["gram", "kronecker", "fisher"])
def test_one_kind_alone(kind: str, estimated: Callable[..., tuple[Path, Path]]) -> None:
    _, folder = estimated(curvatures=(kind,))
    found = Statistics(folder).content["curvatures"]
    assert {name: len(layers) for name, layers in found.items()} == {kind: 14}


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "bert"])
def test_kronecker_and_fisher_of_other_families(name: str, estimated: Callable[..., tuple[Path, Path]]) -> None:
    source, folder = estimated(name, curvatures=("kronecker", "fisher"))
    statistics, network = Statistics(folder), CheckpointNetwork(Checkpoint(source), torch.float32, CPU)
    for layer in network.layers:
        kronecker = statistics.kronecker(layer.name, CPU)
        assert kronecker is not None
        assert kronecker.shape == layer.module.weight.shape
        assert kronecker.transposed == layer.transposed


def test_statistics_without_a_gram_are_refused_by_name(
    estimated: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    source, folder = estimated(curvatures=("fisher",))
    with pytest.raises(
        CheckpointError, match="holds fisher but no gram: estimate it again with --curvature fisher,gram"
    ):
        compress(source, tmp_path / "out", statistics=folder, data=None)
    with pytest.raises(OptionError, match="no curvature 'hessian' to estimate: use gram, kronecker, fisher"):
        hesse.estimate(source, tmp_path / "other", data=tmp_path / "ids.jsonl", curvatures=["hessian"])


# Refusals


def test_another_model_is_refused_by_name(
    estimated: Callable[..., tuple[Path, Path]], family_folder: FolderOf, tmp_path: Path
) -> None:
    source, folder = estimated()
    with pytest.raises(CheckpointError, match=r"is of another model than .*: config\.json differs"):
        compress(family_folder("mistral"), tmp_path / "out", statistics=folder, data=None)

    def nudge(tensors: dict[str, Tensor]) -> None:
        tensors["model.norm.weight"][0] += 1

    changed = change(Path(shutil.copytree(source, tmp_path / "changed")), nudge)
    with pytest.raises(CheckpointError, match=r"model\.safetensors differs; estimate it again"):
        compress(changed, tmp_path / "out", statistics=folder, data=None)
    assert left_over(tmp_path) == []


def test_data_that_changed_is_refused(estimated: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    source, folder = estimated()
    write_ids(tmp_path / "ids.jsonl", OTHER_IDS)
    with pytest.raises(DataError, match=r"ids\.jsonl has changed since"):
        compress(source, tmp_path / "out", statistics=folder, data=None)
    compress(source, tmp_path / "out", statistics=folder, data=OTHER_IDS, bits=4, group_size=32)


def test_damaged_statistics_are_refused(estimated: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    source, folder = estimated()
    with pytest.raises(CheckpointError, match=r"has no statistics\.json"):
        compress(source, tmp_path / "out", statistics=tmp_path, data=None)
    whole = (folder / "gram-00003.safetensors").read_bytes()
    (folder / "gram-00003.safetensors").write_bytes(whole[:-10])
    with pytest.raises(CheckpointError, match=r"gram-00003\.safetensors cannot be read"):
        compress(source, tmp_path / "out", statistics=folder, data=None)
    (folder / "gram-00003.safetensors").write_bytes(whole)
    (folder / "output_factors.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"output_factors\.safetensors cannot be read"):
        compress(source, tmp_path / "out", statistics=folder, data=None)
    assert left_over(tmp_path) == []


def test_what_cannot_be_estimated_leaves_nothing(
    estimated: Callable[..., tuple[Path, Path]], half_folder: FolderOf, tmp_path: Path
) -> None:
    source, folder = estimated()
    before = load_file(folder / "gram-00001.safetensors")
    with pytest.raises(OutputError, match="exists"):
        hesse.estimate(source, folder, data=tmp_path / "ids.jsonl")
    with pytest.raises(OutputError, match=r"no statistics\.json, so --overwrite"):
        hesse.estimate(source, tmp_path, data=tmp_path / "ids.jsonl", overwrite=True)
    with pytest.raises(OptionError, match="give a file, not token ids"):
        hesse.estimate(source, tmp_path / "other", data=IDS)  # type: ignore[arg-type]

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")

    broken = change(Path(shutil.copytree(source, tmp_path / "broken")), spoil)
    with pytest.raises(DataError, match=r"up_proj\.weight holds NaN"):
        hesse.estimate(broken, folder, data=tmp_path / "ids.jsonl", overwrite=True)
    assert torch.equal(load_file(folder / "gram-00001.safetensors")["second_moment"], before["second_moment"])
    assert left_over(tmp_path, "statistics") == ["statistics"]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_damage_is_reckoned_with_the_fisher_that_was_estimated(
    name: str, estimated: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    source, folder = estimated(name, curvatures=("gram", "fisher"))
    compress(source, tmp_path / "out", method="obd", statistics=folder, data=None, sparsity=0.3, scope="layer")
    statistics = Statistics(folder)
    before, after = dense_tensors(source), dense_tensors(tmp_path / "out")
    for layer in CheckpointNetwork(Checkpoint(source), torch.float32, CPU).layers:
        fisher = statistics.fisher(layer.name, CPU)
        assert fisher is not None
        weight, pruned = before[f"{layer.name}.weight"], after[f"{layer.name}.weight"]
        price = fisher.values * weight.float().square()
        assert float(price[pruned == 0].max()) <= float(price[pruned != 0].min())


def test_statistics_without_the_fisher_are_refused(estimated: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    source, folder = estimated(curvatures=("gram",))
    with pytest.raises(CheckpointError, match="holds gram but no fisher"):
        compress(source, tmp_path / "out", method="obd", statistics=folder, data=None)
    with pytest.raises(OptionError, match="--statistics holds no fisher blocks"):
        compress(source, tmp_path / "out", method="obert", statistics=folder, data=None)
    assert left_over(tmp_path) == []
