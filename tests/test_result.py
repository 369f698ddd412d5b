"""The schema that all reports share."""

import json
from dataclasses import dataclass, field

import torch
from torch import nn

from hesse.result import NOT_WRITTEN, SCHEMA, LossChange, Report, Result


@dataclass(frozen=True)
class Layer:
    name: str
    shape: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Example(Report):
    layers: list[Layer]
    codes: dict[str, torch.Tensor] = field(default_factory=dict, metadata=NOT_WRITTEN)


def test_a_report_becomes_json_without_its_tensors() -> None:
    layers = [Layer("a", (2, 3)), Layer("b", (4, 5))]
    report = Example(
        verb="compress",
        model="net",
        layers=layers,
        loss=LossChange(name="KL", predicted=0.5),
        codes={"a": torch.zeros(2)},
    )
    content = Result(report, nn.Linear(2, 2)).to_dict()
    assert json.loads(json.dumps(content)) == content
    assert list(content)[:2] == ["schema", "verb"]
    assert content["schema"] == SCHEMA
    assert content["layers"] == [{"name": "a", "shape": [2, 3]}, {"name": "b", "shape": [4, 5]}]
    assert content["loss"]["predicted"] == 0.5
    assert content["loss"]["unit"] == "nats per token"
    assert "codes" not in content
