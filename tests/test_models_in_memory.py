"""Transformers models in memory: the passes are those of a checkpoint on disk, and batches of any kind are taken."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

import hesse
import tiny_models
from helpers import IDS, dense_tensors, fast_first
from hesse.errors import OptionError
from hesse.methods import Recipe, Rule
from hesse.methods.constraint_options import ConstraintOptions, GridOptions
from hesse.methods.solver_options import SolverOptions

FolderOf = Callable[[str], Path]
GRID: dict[str, Any] = {"bits": 4, "group_size": 32}


def how(method: str) -> dict[str, Any]:
    """Arguments of `compress`; "weighted" is GPTQ under the Gram of weighted positions."""
    if method == "weighted":
        constraint, solver = ConstraintOptions(grid=GridOptions(**GRID)), SolverOptions(name="error_feedback")
        return {"recipe": Recipe(rules=(Rule(curvature="weighted_gram", constraint=constraint, solver=solver),))}
    options = hesse.Options(sparsity=0.5) if method in ("obd", "woodfisher") else hesse.Options(**GRID)
    return {"method": method, "options": options}


def loaded(name: str, folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = tiny_models.load(name, folder)
    return model


@pytest.mark.parametrize("name", fast_first(["llama", "gpt2", "opt", "gpt-neox"]))
@pytest.mark.parametrize("method", ["gptq", "kronecker", "aptq", "obd", "woodfisher", "weighted"])
def test_a_model_in_memory_becomes_what_it_becomes_on_disk(
    name: str, method: str, family_folder: FolderOf, tmp_path: Path
) -> None:
    folder = family_folder(name)
    written = hesse.compress(folder, tmp_path / "out", data=IDS, format="dense", **how(method))
    model = loaded(name, folder)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    result = hesse.compress(model, data=IDS, **how(method))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert result.model is not None
    result.model.save_pretrained(tmp_path / "held")
    on_disk, held = dense_tensors(tmp_path / "out"), dense_tensors(tmp_path / "held")
    for key, tensor in on_disk.items():
        assert torch.equal(tensor, held[key]), key
    predicted = sum(layer.predicted_loss_increase or 0.0 for layer in written.report.layers)
    assert result.report.predicted_loss_increase == pytest.approx(predicted, rel=1e-6)


def test_batches_of_a_loader_are_the_ids_in_them(family_folder: FolderOf) -> None:
    """Dictionaries as collators make them, a DataLoader and a datasets.Dataset give what the lists of ids give."""
    datasets = pytest.importorskip("datasets")
    model, ids = loaded("llama", family_folder("llama")), torch.tensor(IDS)
    rows: Any = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]
    kinds = [
        IDS,
        DataLoader(rows, batch_size=2),
        [{"input_ids": ids[:4]}, {"input_ids": ids[4:]}],
        datasets.Dataset.from_dict({"input_ids": IDS}),
    ]
    first, *others = (hesse.compress(model, data=data, **how("gptq")).model.state_dict() for data in kinds)
    for other in others:
        assert all(torch.equal(value, first[key]) for key, value in other.items())


def test_padding_and_labels_are_masked(family_folder: FolderOf) -> None:
    """The loss is transformers' own, of the labels that are given, and of no padding."""
    model, ids = loaded("llama", family_folder("llama")), torch.tensor(IDS)[:4]
    mask = torch.ones_like(ids)
    mask[:, -5:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    expected = model(input_ids=ids, attention_mask=mask, labels=labels).loss.item()
    padded = {"input_ids": ids, "attention_mask": mask}
    for batch in (padded, {**padded, "labels": labels}):
        report = hesse.compress(model, data=[batch], **how("gptq")).report
        assert report.loss_before == pytest.approx(expected, rel=1e-5)
    with pytest.raises(OptionError, match="of the attention of a transformers language model that is given text"):
        hesse.compress(model, data=[padded], **how("aptq"))


def test_dictionaries_are_the_arguments_of_any_module() -> None:
    class Named(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(8, 4)

        def forward(self, pixels: Tensor) -> Tensor:
            result: Tensor = self.layer(pixels)
            return result

    torch.manual_seed(0)
    model, pixels, labels = Named(), torch.randn(64, 8), torch.randint(0, 4, (64,))
    options: dict[str, Any] = {"method": "gptq", "options": hesse.Options(bits=3, group_size=-1)}
    one = hesse.compress(model, data=[{"pixels": pixels, "labels": labels}], **options).model
    other = hesse.compress(model, data=[(pixels, labels)], **options).model
    assert torch.equal(one.layer.weight, other.layer.weight)
    with pytest.raises(OptionError, match="batch 0 is Tensor"):
        hesse.compress(model, data=[pixels], **options)


def test_what_is_for_files_is_refused_with_a_reason(family_folder: FolderOf, tmp_path: Path) -> None:
    model = loaded("llama", family_folder("llama"))
    with pytest.raises(OptionError, match="out is a folder, and a module stays in memory"):
        hesse.compress(model, tmp_path / "out", data=IDS)
    with pytest.raises(OptionError, match="size is a budget of the files"):
        hesse.compress(model, data=IDS, size="40%")
    with pytest.raises(OptionError, match="give out"):
        hesse.compress(family_folder("llama"), data=IDS)
    model.config._name_or_path = str(tmp_path)
    with pytest.raises(OptionError, match="text needs the tokenizer"):
        hesse.compress(model, data="default", **how("gptq"))
