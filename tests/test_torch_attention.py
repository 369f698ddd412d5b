"""torch's own attention and encoders: taken apart for methods that see layers, and put together again."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hesse
from helpers import compress_module
from hesse.errors import OptionError
from hesse.methods import find_method
from hesse.networks.narrow_attention import NarrowAttention, outputs_called
from hesse.networks.torch_attention import SplitAttention, split_attentions
from hesse.testing import normal
from hesse.training import Training, prunable_weights

WIDTH, HEADS = 16, 4


class Encoder(nn.Module):
    """A user's classifier of sequences, of nothing but torch's own parts."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 24, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers)
        for number, copy in enumerate(self.encoder.layers):
            torch.manual_seed(number)
            for parameter in copy.parameters():
                if parameter.ndim > 1:
                    nn.init.normal_(parameter, std=0.3)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, ids: Tensor, padding: Tensor | None = None) -> Tensor:
        hidden = self.encoder(self.embedding(ids), src_key_padding_mask=padding)
        result: Tensor = self.head(hidden[:, 0])
        return result


@pytest.fixture
def encoder() -> Encoder:
    return Encoder().eval()


@pytest.fixture
def batches(encoder: Encoder) -> list[tuple[Tensor, Tensor]]:
    ids = torch.randint(0, 20, (96, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return list(zip(ids.split(32), encoder(ids).argmax(-1).split(32), strict=True))


MASKS: dict[str, dict[str, Tensor]] = {
    "none": {},
    "causal": {"attn_mask": torch.ones(5, 5, dtype=torch.bool).triu(1)},
    "added": {"attn_mask": normal(9, 5, 5)},
    "for each head": {"attn_mask": normal(8, 3 * HEADS, 5, 5)},
    "padding": {"key_padding_mask": torch.tensor([[False] * (5 - k) + [True] * k for k in (0, 1, 2)])},
}


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("settings", [{}, {"bias": False}, {"batch_first": True}], ids=str)
@pytest.mark.parametrize("context", [split_attentions, outputs_called])
def test_taken_apart_it_gives_what_it_gave(context: Any, settings: dict[str, Any], masks: str) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(WIDTH, HEADS, **settings, dtype=torch.float64).eval()
    if attention.in_proj_bias is not None:
        nn.init.normal_(attention.in_proj_bias)
    shape = (3, 5, WIDTH) if attention.batch_first else (5, 3, WIDTH)
    parts, before = [normal(k, *shape) for k in range(3)], deepcopy(attention.state_dict())
    expected, weights = attention(*parts, **MASKS[masks])
    with context(nn.ModuleList([attention])):
        assert isinstance(attention, NarrowAttention)
        found, shown = attention(*parts, **MASKS[masks])
        assert attention(*parts, need_weights=False, **MASKS[masks])[1] is None
        each = attention(*parts, average_attn_weights=False, **MASKS[masks])[1]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(shown, weights)
    torch.testing.assert_close(each.mean(1), weights)
    assert type(attention) is nn.MultiheadAttention
    assert list(attention.state_dict()) == list(before)
    torch.testing.assert_close(attention(*parts, **MASKS[masks])[0], expected)
    for name, tensor in attention.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_one_sample_alone() -> None:
    attention = nn.MultiheadAttention(WIDTH, HEADS, dtype=torch.float64).eval()
    value = normal(0, 5, WIDTH)
    expected = attention(value, value, value)[0]
    with split_attentions(nn.ModuleList([attention])):
        torch.testing.assert_close(attention(value, value, value)[0], expected)


def test_attention_of_other_kinds_is_left_alone() -> None:
    odd = nn.ModuleList(
        [
            nn.MultiheadAttention(WIDTH, HEADS, kdim=8),
            nn.MultiheadAttention(WIDTH, HEADS, add_bias_kv=True),
            nn.MultiheadAttention(WIDTH, HEADS, add_zero_attn=True),
        ]
    )
    with split_attentions(odd):
        assert [type(module) for module in odd] == [nn.MultiheadAttention] * 3


def test_rounded_projections_are_in_the_weight_that_torch_keeps(
    encoder: Encoder, batches: list[tuple[Tensor, Tensor]]
) -> None:
    before = deepcopy(encoder.state_dict())
    report = compress_module(encoder, batches, method="gptq", options=hesse.Options(bits=4))
    assert report.notes == []
    changed = report.module
    assert list(changed.state_dict()) == list(before)
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, before[name])
    by_name = {layer.name: layer for layer in report.layers}
    grid = hesse.Options(bits=4)
    for number in range(2):
        path = f"encoder.layers.{number}.self_attn"
        attention = changed.get_submodule(path)
        assert type(attention) is nn.MultiheadAttention
        for name, rows in zip(("q_proj", "k_proj", "v_proj"), attention.in_proj_weight.chunk(3), strict=True):
            assert by_name[f"{path}.{name}"].shape == (WIDTH, WIDTH)
            (rule,) = find_method("gptq").recipe(grid).rules
            assert torch.equal(rule.constraint.build().decode(report.encoded[f"{path}.{name}"]), rows)
        assert f"{path}.out_proj" in by_name
    (ids, _), *_ = batches
    with torch.no_grad():  # torch's fused form, on what was put together
        torch.testing.assert_close(changed(ids), changed.train(False)(ids))


def test_a_factorised_encoder_runs_as_torch_runs_it(encoder: Encoder, batches: list[tuple[Tensor, Tensor]]) -> None:
    report = compress_module(encoder, batches, method="activation-svd", options=hesse.Options(rank=4), ignore=["head"])
    thin, (ids, _) = report.module, batches[0]
    assert isinstance(thin.get_submodule("encoder.layers.0.self_attn"), SplitAttention)
    padding = torch.zeros(ids.shape, dtype=torch.bool)
    padding[:, -2:] = True
    with torch.enable_grad():  # layer by layer
        thin.requires_grad_()
        expected, padded = thin(ids).detach(), thin(ids, padding).detach()
    with torch.inference_mode():  # fused where torch can
        torch.testing.assert_close(thin(ids), expected)
        torch.testing.assert_close(thin(ids, padding), padded)
    for name in ("linear1", "self_attn.v_proj"):
        pair = thin.get_submodule(f"encoder.layers.0.{name}")
        torch.testing.assert_close(pair.weight, pair[1].weight @ pair[0].weight)


def test_zeros_in_projections_are_found_and_held_while_training(
    encoder: Encoder, batches: list[tuple[Tensor, Tensor]]
) -> None:
    chosen = prunable_weights(encoder, "2:4")
    assert "encoder.layers.0.self_attn.in_proj_weight" in chosen
    assert type(encoder.encoder.layers[0].self_attn) is nn.MultiheadAttention
    hesse.prune_gradually(encoder, batches, Training(steps=6), "2:4", loss_function=nn.CrossEntropyLoss(), cuts=2)
    for name in chosen:
        weight = encoder.get_parameter(name)
        assert (weight.view(len(weight), -1, 4) != 0).sum(-1).max() == 2, name


@pytest.mark.parametrize("score", ["gradient", "oba", "obd", "m-fac-network"])
def test_scores_over_the_network_see_the_projections(
    encoder: Encoder, batches: list[tuple[Tensor, Tensor]], score: str
) -> None:
    result = hesse.prune(encoder, data=batches, what="weights", method=score, sparsity=0.5)
    assert result.model is not None
    assert {layer.name.rpartition(".")[2] for layer in result.report.layers} >= {
        "q_proj",
        "k_proj",
        "v_proj",
        "out_proj",
    }
    assert float((result.model.encoder.layers[0].self_attn.in_proj_weight == 0).float().mean()) > 0.05


@pytest.mark.parametrize("method", ["obs", "heapr"])
def test_heads_are_judged_by_what_reads_them(
    encoder: Encoder, batches: list[tuple[Tensor, Tensor]], method: str
) -> None:
    result = hesse.prune(encoder, data=batches, what="groups", method=method, keep=0.5)
    smaller: Any = result.model
    assert result.report.difference < 1e-4
    assert [layer.self_attn.num_heads for layer in smaller.encoder.layers] == [2, 2]
    (ids, _), *_ = batches
    padding = torch.zeros(ids.shape, dtype=torch.bool)
    padding[:, -2:] = True
    with torch.inference_mode():
        assert smaller(ids, padding).isfinite().all()


def test_a_pattern_that_does_not_fit_a_projection_is_refused(batches: list[tuple[Tensor, Tensor]]) -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
    with pytest.raises(OptionError, match="_proj: sparsity 2:4"):
        compress_module(model, batches, method="sparsegpt", options=hesse.Options(sparsity="2:4"))
    assert type(model.self_attn) is nn.MultiheadAttention
