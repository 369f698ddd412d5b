"""What `hesse inspect` says, against plain computations on the same model."""

import json
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import hesse
import tiny_models
from helpers import IDS, CommandLine, change, fast_first, write_ids
from hesse.constraints import Grid
from hesse.curvature import Gram, Identity
from hesse.errors import CheckpointError, OptionError, UnsupportedModelError
from hesse.inspection import SCHEMES, Inspection
from hesse.inspection.layers import rank_correlation
from hesse.reporting import inspection_page
from hesse.solvers import Nearest, solve

FolderOf = Callable[[str], Path]
FEW = IDS[:3]
LAYER = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def llama(family_folder: FolderOf) -> tuple[Path, Inspection]:
    source = family_folder("llama")
    return source, hesse.inspect(source, data=FEW).report


def test_the_loss_and_its_gradient(llama: tuple[Path, Inspection]) -> None:
    source, found = llama
    model = tiny_models.load("llama", source).float()
    ids = torch.tensor(FEW)
    loss = model(input_ids=ids, labels=ids).loss
    names = {f"{layer.name}.weight" for layer in found.layers}
    weights = [p for name, p in model.named_parameters() if name in names]
    assert len(weights) == len(found.layers) == 14
    assert found.model_loss == pytest.approx(float(loss.detach()), rel=1e-5)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)])
    assert found.gradient_norm == pytest.approx(float(gradient.norm()), rel=1e-4)
    assert found.parameters == sum(p.numel() for p in weights)
    assert (found.samples, found.tokens) == (3, 96)


def test_what_is_measured_is_what_evaluating_the_changed_model_gives(
    llama: tuple[Path, Inspection], tmp_path: Path
) -> None:
    source, found = llama
    layer = next(layer for layer in found.layers if layer.name == LAYER)
    for scheme in ("3 bits", "50 % zeros"):

        def edit(tensors: dict[str, Tensor], scheme: str = scheme) -> None:
            weight = tensors[f"{LAYER}.weight"]
            tensors[f"{LAYER}.weight"] = solve(weight.float(), Identity(), SCHEMES[scheme], Nearest()).weight.to(weight)

        copy = Path(shutil.copytree(source, tmp_path / scheme.replace(" ", "")))
        result = hesse.evaluate(change(copy, edit), reference=source, data=FEW).report
        assert layer.measured[scheme][0] == pytest.approx(result.kl, rel=1e-3)
        assert layer.measured[scheme][1] == pytest.approx(result.kl_standard_error, rel=1e-3)


def test_predictions_are_quadratic_forms(llama: tuple[Path, Inspection]) -> None:
    source, found = llama
    layer = next(layer for layer in found.layers if layer.name == LAYER)
    model = tiny_models.load("llama", source).float()
    module, seen = model.get_submodule(LAYER), []
    module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        model(input_ids=torch.tensor(FEW)[:, :])
    weight = module.weight.detach()
    change = solve(weight, Identity(), Grid(2, 128), Nearest()).weight - weight
    assert layer.predicted["2 bits"]["identity"] == pytest.approx(0.5 * float(change.square().sum()), rel=1e-5)
    # The last position of a sample has no next token, so no gradient, and counts in no factor.
    gram = Gram.from_inputs(torch.cat(seen)[:, :-1])
    assert layer.predicted["2 bits"]["gram"] == pytest.approx(gram.quadratic(change), rel=1e-4)
    for costs in layer.predicted.values():
        assert all(cost > 0 for cost in costs.values())
    assert layer.mean_eigenvalue == pytest.approx(layer.trace[0] / weight.numel())
    assert 0 < layer.trace[1] < layer.trace[0]


def test_small_changes_cost_what_the_fisher_predicts(llama: tuple[Path, Inspection]) -> None:
    _, found = llama
    for kind in ("eigen-kronecker", "kronecker", "fisher diagonal"):
        predicted = sum(layer.predicted["4 bits"][kind] for layer in found.layers)
        measured = sum(layer.measured["4 bits"][0] for layer in found.layers)
        assert 1 / 3 < predicted / measured < 3
        assert found.rank_correlations["4 bits"][kind] > 0.5


def test_the_spectrum_is_bounded_by_what_is_said(llama: tuple[Path, Inspection]) -> None:
    _, found = llama
    trace, error = found.trace
    assert error > 0
    assert sum(layer.trace[0] for layer in found.layers) == pytest.approx(trace, rel=0.5)
    tops, lows = found.largest_eigenvalues, found.smallest_eigenvalues
    assert len(tops) == len(lows) == 3
    assert tops[0][0] > tops[1][0] > tops[2][0] > lows[2][0] > lows[1][0] > lows[0][0]
    assert found.at_a_minimum == (lows[0][0] >= -lows[0][1])


@pytest.mark.parametrize("name", fast_first(["opt", "mixtral", "gemma3", "gpt2"]))
def test_other_families(name: str, family_folder: FolderOf) -> None:
    found = hesse.inspect(family_folder(name), data=FEW).report
    assert found.layers
    assert all(layer.measured["2 bits"][0] > 0 for layer in found.layers)


def test_predictions_from_statistics(llama: tuple[Path, Inspection], tmp_path: Path) -> None:
    source, plain = llama
    data = write_ids(tmp_path / "ids.jsonl", FEW)
    kinds = ("gram", "kronecker", "fisher")
    hesse.estimate(source, tmp_path / "statistics", data=data, curvatures=kinds)
    found = hesse.inspect(source, data=data, statistics=tmp_path / "statistics").report
    assert list(found.rank_correlations["4 bits"]) == ["identity", "gram", "fisher diagonal", "kronecker"]
    for ours, theirs in zip(found.layers, plain.layers, strict=True):
        assert ours.measured == theirs.measured
        for kind, value in ours.predicted["3 bits"].items():
            assert value == pytest.approx(theirs.predicted["3 bits"][kind], rel=0.1)
    assert str(tmp_path / "statistics") in inspection_page(found)
    with pytest.raises(CheckpointError, match="is of another model"):
        hesse.inspect("default", statistics=tmp_path / "statistics")


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.integers(0, 5), min_size=2, max_size=8), seed=st.integers(0, 99))
def test_rank_correlation_is_the_correlation_of_average_ranks(values: list[int], seed: int) -> None:
    left = torch.tensor(values).float()
    right = left[torch.randperm(len(left), generator=torch.Generator().manual_seed(seed))]

    def ranks(numbers: Tensor) -> Tensor:
        return torch.tensor([[(a < b) + 0.5 * (a == b) for a in numbers] for b in numbers]).double().sum(1)

    expected = torch.corrcoef(torch.stack([ranks(left), ranks(right)]))[0, 1]
    assert rank_correlation(left, right) == pytest.approx(float(expected), nan_ok=True)


def test_on_the_command_line(family_folder: FolderOf, hesse_command: CommandLine, tmp_path: Path) -> None:
    source, data = family_folder("llama"), write_ids(tmp_path / "ids.jsonl", FEW)
    ran = hesse_command("inspect", source, "--data", data, "--json")
    assert ran.code == 0
    content: dict[str, Any] = json.loads(ran.stdout)
    assert content["model"] == str(source)
    assert content["layers"][0]["predicted"].keys() == SCHEMES.keys()
    ran = hesse_command("inspect", source, "--data", data)
    assert "smallest eigenvalues" in ran.stdout
    assert "rank correlation" in ran.stdout
    assert "To rank this model's layers, trust the" in ran.stdout


def test_the_page_holds_everything_and_needs_no_network(llama: tuple[Path, Inspection]) -> None:
    source, found = llama
    page = inspection_page(found)

    class Reader(HTMLParser):
        open: ClassVar[list[str]] = []

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag != "meta":
                self.open.append(tag)
            assert not any(name == "src" or (name == "href" and value and value[0] != "#") for name, value in attrs)
            assert tag not in ("script", "link", "img")

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag

    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    assert page.count("<svg") == 3
    assert page.count("<!doctype html>") == 1
    assert str(source) in page
    for layer in found.layers:
        assert page.count(f"<code>{layer.name}</code>") == 1
    assert "trust the" in page


@pytest.mark.slow
def test_a_page_on_the_command_line(
    family_folder: FolderOf, hesse_command: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, data, out = family_folder("llama"), write_ids(tmp_path / "ids.jsonl", FEW), tmp_path / "page.html"
    ran = hesse_command("inspect", source, "--data", data, "--report", out)
    assert ran.code == 0
    assert f"The report: {out}" in ran.stdout.replace("\n", "")
    assert "<svg" in out.read_text(encoding="utf-8")
    refused = hesse_command("inspect", source, "--data", data, "--report", out)
    assert (refused.code, "exists: give another name, or --overwrite" in refused.error) == (1, True)
    assert hesse_command("inspect", source, "--data", data, "--report", out, "--overwrite").code == 0
    nowhere = hesse_command("inspect", source, "--data", data, "--report", tmp_path / "no" / "page.html")
    assert (nowhere.code, "make it first" in nowhere.error) == (1, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ids.jsonl", "page.html"]
    monkeypatch.setattr("hesse.reporting.page.find_spec", lambda _: None)
    lacking = hesse_command("inspect", source, "--data", data, "--report", tmp_path / "other.html")
    assert (lacking.code, "pip install 'hesse[report]'" in lacking.error) == (2, True)


# Refusals


def test_models_without_a_next_token_are_refused(family_folder: FolderOf) -> None:
    with pytest.raises(UnsupportedModelError, match="an encoder without a loss of its own"):
        hesse.inspect(family_folder("bert"), data=FEW)


def test_one_sample_is_too_few(family_folder: FolderOf) -> None:
    with pytest.raises(OptionError, match="--samples is 1"):
        hesse.inspect(family_folder("llama"), data=FEW, samples=1)
