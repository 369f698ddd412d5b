"""Padding and labels of tokenised lines: every loss counts what plain transformers counts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM

import hesse
import tiny_models
from hesse.curvature.losses import next_tokens

FolderOf = Callable[[str], Path]
IDS = tiny_models.random_ids(8, 24)
HIDDEN = 10  # first tokens of each sample, a prompt that is not scored
PADS = 8


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def padded(ids: list[int], hidden: int) -> dict[str, Any]:
    labels = [-100] * hidden + ids[hidden:]
    return {
        "input_ids": ids + [0] * PADS,
        "attention_mask": [1] * len(ids) + [0] * PADS,
        "labels": labels + [-100] * PADS,
    }


def without_padding(record: dict[str, Any]) -> dict[str, Any]:
    return {key: values[:-PADS] for key, values in record.items() if key != "attention_mask"}


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    return [padded(ids, HIDDEN) for ids in IDS]


def test_the_loss_is_that_of_transformers(
    family_folder: FolderOf, records: list[dict[str, Any]], tmp_path: Path
) -> None:
    folder = family_folder("llama")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    batch = {name: torch.tensor([record[name] for record in records]) for name in records[0]}
    with torch.no_grad():
        expected = float(model(**batch).loss)
    report = hesse.evaluate(folder, data=write(tmp_path / "a.jsonl", records), reference=folder).report
    assert report.model_loss == pytest.approx(expected, rel=1e-5)
    assert report.tokens == len(IDS) * (len(IDS[0]) - HIDDEN)
    assert report.kl == pytest.approx(0, abs=1e-9)


def test_inspection_is_of_the_scored_tokens(
    family_folder: FolderOf, records: list[dict[str, Any]], tmp_path: Path
) -> None:
    folder = family_folder("llama")
    data = write(tmp_path / "a.jsonl", records[:2])
    evaluated = hesse.evaluate(folder, data=data).report.model_loss
    assert evaluated is not None
    assert hesse.inspect(folder, data=data).report.model_loss == pytest.approx(evaluated, rel=1e-5)


def test_the_output_factors_are_of_the_scored_tokens(
    family_folder: FolderOf, records: list[dict[str, Any]], tmp_path: Path
) -> None:
    """The last layer's input-free output gradients: behind the last block no hidden token has a gradient."""
    from hesse.checkpoints.tensor_store import TensorStore
    from hesse.data import read_samples
    from hesse.formats import open_networks
    from hesse.networks.network import each_loaded
    from hesse.passes.backward import BackwardPass
    from hesse.passes.stream import advance, start

    samples, _ = read_samples(
        write(tmp_path / "a.jsonl", records), tmp_path, count=None, length=8, seed=0, purpose="calibration", limit=None
    )
    _, network, _ = open_networks(family_folder("llama"), torch.device("cpu"))
    flows = start(network, samples.batches(4))
    for index, block in each_loaded(network):
        advance(flows, block.module, index)
    walk = BackwardPass(network, flows, [], seed=0, shelf=TensorStore())
    assert walk.scale == pytest.approx(1 / (len(IDS) * (len(IDS[0]) - HIDDEN)))
    for gradient in walk.state.gradients:
        length = gradient.tensor().norm(dim=-1)
        assert not length[:, : HIDDEN - 1].any()
        assert length[:, HIDDEN - 1 : -1].all()
        assert not length[:, -1].any()


def test_pads_are_not_calibrated_on(family_folder: FolderOf, records: list[dict[str, Any]], tmp_path: Path) -> None:
    folder = family_folder("llama")
    files = [
        write(tmp_path / "padded.jsonl", records),
        write(tmp_path / "cut.jsonl", [without_padding(record) for record in records]),
        write(tmp_path / "other.jsonl", [{"input_ids": ids} for ids in IDS]),
    ]
    options = hesse.Options(bits=3, group_size=32)
    results = [hesse.compress(folder, tmp_path / path.stem, options=options, data=path).report for path in files]
    weights = [(tmp_path / path.stem / "model.safetensors").read_bytes() for path in files]
    assert weights[0] == weights[1] != weights[2]  # the output factors are of fewer targets
    losses = [report.loss for report in results]
    assert losses[0].measured == losses[1].measured != losses[2].measured
    assert hesse.evaluate(tmp_path / "padded", reference=folder, data=files[0]).report.tokens == len(IDS) * 14


def test_a_data_set_with_mask_and_labels(
    family_folder: FolderOf, records: list[dict[str, Any]], tmp_path: Path
) -> None:
    folder, options = family_folder("llama"), hesse.Options(bits=3, group_size=32)
    made = datasets.Dataset.from_list(records)
    hesse.compress(folder, tmp_path / "a", options=options, data=made)
    hesse.compress(folder, tmp_path / "b", options=options, data=write(tmp_path / "b.jsonl", records))
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]


def test_a_module_is_compressed_on_what_the_mask_keeps(family_folder: FolderOf, records: list[dict[str, Any]]) -> None:
    model = AutoModelForCausalLM.from_pretrained(family_folder("llama"), dtype=torch.float32)
    masked = [{name: record[name] for name in ("input_ids", "attention_mask")} for record in records]
    options = hesse.Options(bits=3, group_size=32)
    one, other = (
        hesse.compress(model, data=data, options=options).model
        for data in (datasets.Dataset.from_list(masked), [record["input_ids"][:-PADS] for record in records])
    )
    assert one is not None
    assert other is not None
    for left, right in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(left, right)


def test_targets_without_hidden_tokens_are_the_next_tokens() -> None:
    ids = torch.tensor(IDS)
    assert next_tokens(ids)[:, :-1].equal(ids[:, 1:])
    assert bool((next_tokens(ids)[:, -1] == -100).all())


def test_measurements_are_of_the_scored_tokens(family_folder: FolderOf, tmp_path: Path) -> None:
    """The samples are longer than the pieces that single layers are measured on, which are prompt alone."""
    folder, options = family_folder("llama"), hesse.Options(bits=3, group_size=32)
    ids = tiny_models.random_ids(1, 64)[0]
    data = write(tmp_path / "a.jsonl", [{"input_ids": ids, "labels": [-100] * 60 + ids[60:]} for _ in range(32)])
    report = hesse.compress(folder, tmp_path / "out", options=options, data=data, measure=True).report
    assert report.measurements is not None
    assert report.loss.measured == pytest.approx(
        hesse.evaluate(tmp_path / "out", reference=folder, data=data, samples=report.loss.samples).report.kl, rel=1e-4
    )
