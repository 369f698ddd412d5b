"""Arguments of the verbs on modules: what has no meaning there, data of all kinds, and values that are not finite."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import hesse
from hesse.errors import DataError, HesseError, OptionError


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


INPUTS, TARGETS = torch.randn(16, 6, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 3
PAIRS = [(INPUTS, TARGETS)]
GROUPS: dict[str, Any] = {"what": "hidden", "method": "obs"}


def same(left: nn.Module, right: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left.state_dict().values(), right.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dry_run", True),
        ("overwrite", True),
        ("restart", True),
        ("samples", 4),
        ("length", 8),
        ("batch_size", 2),
        ("bos", True),
        ("device", "cpu"),
    ],
)
def test_options_of_models_on_disk_are_refused(name: str, value: Any) -> None:
    with pytest.raises(OptionError, match=f"^{name} is for models on disk"):
        hesse.prune(net(), data=PAIRS, **{name: value})


@pytest.mark.parametrize(("name", "value"), [("samples", 4), ("length", 8), ("batch_size", 2)])
def test_settings_of_token_ids_are_refused_for_batches(name: str, value: int) -> None:
    with pytest.raises(OptionError, match=f"^{name} is for text and token ids"):
        hesse.compress(net(), data=PAIRS, **{name: value})


@pytest.mark.parametrize("options", [{}, GROUPS])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_gradients_are_taken_where_the_caller_turned_them_off(options: Any, context: Callable[[], Any]) -> None:
    expected = hesse.prune(net(), data=PAIRS, **options)
    model = net()
    with context():
        found = hesse.prune(model, data=PAIRS, **options)
    assert same(found.model, expected.model)
    assert found.report.loss_after == expected.report.loss_after
    obert = hesse.compress(net(), data=PAIRS, method="obert")
    with context():
        assert same(hesse.compress(model, data=PAIRS, method="obert").model, obert.model)


@pytest.mark.parametrize("options", [{}, GROUPS])
def test_dictionaries_are_pairs(options: Any) -> None:
    named = hesse.prune(net(), data=[{"input": INPUTS, "labels": TARGETS}], **options)
    assert same(named.model, hesse.prune(net(), data=PAIRS, **options).model)


def finetune(model: nn.Module, data: Any) -> nn.Module:
    hesse.finetune(model, data, hesse.Training(steps=3))
    return model


def prune_gradually(model: nn.Module, data: Any) -> nn.Module:
    hesse.prune_gradually(model, data, hesse.Training(steps=3), 0.5, cuts=2)
    return model


@pytest.mark.parametrize("train", [finetune, prune_gradually])
def test_trainings_take_the_data_of_other_verbs_below_no_grad(train: Callable[[nn.Module, Any], nn.Module]) -> None:
    expected = train(net(), PAIRS)
    assert not same(expected, net())
    with torch.no_grad():
        assert same(train(net(), [{"input": INPUTS, "labels": TARGETS}]), expected)
    rows = [{"input": row, "labels": target} for row, target in zip(INPUTS, TARGETS, strict=True)]
    assert same(train(net(), torch.utils.data.DataLoader(rows, 16)), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("train", [finetune, prune_gradually])
def test_trainings_take_language_models_with_padded_batches(train: Callable[[nn.Module, Any], nn.Module]) -> None:
    ids = torch.arange(24).view(4, 6)
    mask = torch.ones_like(ids)
    mask[:, 5:] = 0
    batch, targets = {"input_ids": ids, "attention_mask": mask}, torch.full_like(ids, -100)
    targets[:, :4] = ids[:, 1:5]
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    dense = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1))
    assert same(train(deepcopy(dense), [batch]), train(deepcopy(dense), [(batch, targets)]))


@pytest.mark.parametrize("options", [{}, GROUPS])
@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([{"input": INPUTS}], OptionError, "batch 0 has no labels"),
        ([INPUTS], OptionError, "batch 0 is Tensor"),
        ([(INPUTS, TARGETS, TARGETS)], OptionError, "batch 0 is tuple"),
        ([[1, 2, 3]], OptionError, "batch 0 is list"),
        ([(INPUTS[:0], TARGETS[:0])], DataError, "batch 0 holds no sample"),
        ([], DataError, "no batch"),
        (3, OptionError, "data is int"),
        ([(INPUTS * torch.nan, TARGETS)], DataError, "the loss is nan"),
    ],
)
def test_data_of_other_kinds_is_refused(options: Any, data: Any, error: type[HesseError], message: str) -> None:
    with pytest.raises(error, match=message):
        hesse.prune(net(), data=data, **options)


@pytest.mark.parametrize("options", [{}, GROUPS])
def test_weights_that_are_not_finite_are_refused(options: Any) -> None:
    model = net()
    with torch.no_grad():
        model.get_parameter("2.weight").fill_(torch.inf)
    with pytest.raises(DataError, match=r"2.*holds NaN or infinity"):
        hesse.prune(model, data=PAIRS, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hesse.prune(net(), data=PAIRS, keep="0.5", **GROUPS), "^keep is '0.5'"),
        (lambda: hesse.prune(net(), data=PAIRS, keep=None, **GROUPS), "^keep is None"),
        (lambda: hesse.prune(net(), data=PAIRS, sparsity=None), "^sparsity is None"),
        (lambda: hesse.prune(net(), data=PAIRS, what=3), "^what is 3"),  # type: ignore[arg-type]
        (lambda: hesse.compress(net(), data=3), "^data is int"),
        (lambda: hesse.compress(None), "^the model is NoneType"),  # type: ignore[arg-type]
        (lambda: hesse.rotate(net(), "out"), "^the model is Sequential"),  # type: ignore[arg-type]
        (
            lambda: hesse.finetune(net(), None, hesse.Training(steps=1), loss_function=nn.MSELoss()),  # type: ignore[arg-type]
            "a module needs data",
        ),
    ],
)
def test_arguments_of_other_types_are_refused_by_name(call: Callable[[], object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        call()
