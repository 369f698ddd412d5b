"""Attention with fewer dimensions a head: exact where fewer say all, else the best of their number."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hesse
from hesse.curvature import SquaredError
from hesse.errors import OptionError, UnsupportedModelError
from hesse.methods import METHODS
from hesse.modules.head_dimensions import leading_directions, nearest_product
from hesse.networks.narrow_attention import NarrowAttention
from hesse.scores.surgeon import root
from hesse.testing import normal

WIDTH, HEADS, SIZE = 16, 2, 8


def narrowed(model: nn.Module, data: Any, **options: Any) -> Any:
    """The network with narrower heads by the row of the table, and the report."""
    result = METHODS["modegpt-heads"].run(model, data=data, **options)
    assert result.report.method == "modegpt-heads"
    return result.model, result.report


class Layer(nn.Module):
    """Self-attention, or attention of the second half of the positions to the first."""

    def __init__(self, cross: bool = False, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, bias=bias, batch_first=True)
        self.cross = cross
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.4)

    def forward(self, hidden: Tensor) -> Tensor:
        first, second = (hidden[:, :3], hidden[:, 3:]) if self.cross else (hidden, hidden)
        result: Tensor = self.attention(second, first, first, need_weights=False)[0]
        return result


def data(layer: nn.Module) -> list[tuple[Tensor, Tensor]]:
    inputs = normal(0, 24, 7, WIDTH) @ normal(1, WIDTH, WIDTH)
    with torch.no_grad():
        return [(part, layer(part)) for part in inputs.split(8)]


def of_few_dimensions(layer: Layer, size: int) -> None:
    """Have each head use a space of `size` dimensions only, in no base that shows it."""
    attention = layer.attention
    for head in range(HEADS):
        own, narrow = slice(head * SIZE, (head + 1) * SIZE), torch.zeros(SIZE, SIZE).double()
        narrow[:size, :size] = torch.eye(size)
        turns = [normal(10 * head + k, SIZE, SIZE) for k in range(2)]
        with torch.no_grad():
            for part, turn in ((0, turns[0].inverse().T @ narrow), (1, turns[0]), (2, turns[1] @ narrow)):
                rows = slice(part * WIDTH + own.start, part * WIDTH + own.stop)
                attention.in_proj_weight[rows] = turn @ attention.in_proj_weight[rows]
                if attention.in_proj_bias is not None:
                    attention.in_proj_bias[rows] = turn @ attention.in_proj_bias[rows]
            attention.out_proj.weight[:, own] = attention.out_proj.weight[:, own] @ turns[1].inverse()


@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_what_uses_few_dimensions_is_the_same_with_few(cross: bool, bias: bool) -> None:
    layer = Layer(cross, bias).double().eval()
    of_few_dimensions(layer, 4)
    before, batches = deepcopy(layer.state_dict()), data(layer)
    narrow, report = narrowed(layer, batches, keep=0.5, loss_function=SquaredError())
    assert isinstance(narrow.attention, NarrowAttention)
    assert narrow.attention.in_proj_weight.shape == (3 * HEADS * 4, WIDTH)
    for inputs, outputs in batches:
        torch.testing.assert_close(narrow(inputs), outputs, atol=1e-8, rtol=1e-8)
    assert report.parameters_after < report.parameters_before
    assert report.flops_after < report.flops_before
    assert report.removed == {"dimensions of the heads of attention": (4, 8)}
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


def test_more_dimensions_cost_less_and_any_are_better_than_zeroed_ones() -> None:
    layer = Layer().double().eval()
    batches = data(layer)
    losses = [narrowed(layer, batches, keep=k, loss_function=SquaredError())[1].loss_after for k in (0.25, 0.5, 0.875)]
    assert losses == sorted(losses, reverse=True)
    zeroed = deepcopy(layer)
    with torch.no_grad():
        zeroed.attention.in_proj_weight.view(3, HEADS, SIZE, WIDTH)[:, :, 4:] = 0
        zeroed.attention.in_proj_bias.view(3, HEADS, SIZE)[:, :, 4:] = 0
    assert losses[1] < nn.functional.mse_loss(
        torch.cat([zeroed(inputs) for inputs, _ in batches]), torch.cat([outputs for _, outputs in batches])
    )


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_the_scores_are_the_nearest_of_their_rank(rank: int) -> None:
    queries, keys = normal(0, 6, 10), normal(1, 6, 10)
    moments = [x.T @ x / 40 for x in (normal(2, 40, 10), normal(3, 40, 10))]
    roots = [root(moment) for moment in moments]
    maps = nearest_product(queries @ roots[0], keys @ roots[1], rank)
    left = (maps[0] @ queries).T @ (maps[1] @ keys) - queries.T @ keys
    dropped = torch.linalg.svdvals(roots[0].T @ queries.T @ keys @ roots[1])[rank:]
    error = torch.trace(left.T @ moments[0] @ left @ moments[1])  # E[(q·k - q'·k')²]
    torch.testing.assert_close(error, dropped.square().sum())


def test_directions_of_values_are_those_that_the_outputs_see_most_of() -> None:
    weight, values = normal(0, 9, 6), normal(1, 300, 6) @ normal(2, 6, 6)
    moment = values.T @ values / 300
    chosen = leading_directions(weight, moment, 3)
    torch.testing.assert_close(chosen @ moment @ chosen.T, torch.eye(3).double())

    def left(directions: Tensor) -> Tensor:
        kept = values @ directions.T
        return (values @ weight.T - kept @ torch.linalg.lstsq(kept, values @ weight.T).solution).square().sum() / 300

    best = torch.linalg.svdvals(weight @ root(moment))[3:].square().sum()
    torch.testing.assert_close(left(chosen), best)
    assert all(left(normal(10 + k, 3, 6)) >= best for k in range(20))


def test_a_head_that_gives_nothing_makes_no_trouble() -> None:
    layer = Layer().double().eval()
    with torch.no_grad():
        layer.attention.in_proj_weight[-SIZE:] = 0
        layer.attention.in_proj_bias[-SIZE:] = 0
    batches = data(layer)
    narrow, report = narrowed(layer, batches, keep=0.875, loss_function=SquaredError())
    assert all(parameter.isfinite().all() for parameter in narrow.parameters())
    assert report.loss_after < 0.1 * float(torch.cat([outputs for _, outputs in batches]).square().mean())


def test_what_cannot_be_narrowed_is_refused() -> None:
    layer = Layer().double().eval()
    batches = data(layer)
    for keep in (0.0, 1.0, 1.5):
        with pytest.raises(OptionError, match="must be a share of a head's dimensions"):
            narrowed(layer, batches, keep=keep, loss_function=SquaredError())
    with pytest.raises(OptionError, match=r"keep 0\.99 of 8 dimensions of attention leaves 8"):
        narrowed(layer, batches, keep=0.99, loss_function=SquaredError())
    plain = nn.Sequential(nn.Linear(WIDTH, WIDTH)).double()
    with pytest.raises(UnsupportedModelError, match=r"Sequential has no nn\.MultiheadAttention"):
        narrowed(plain, [(x, x) for x, _ in batches], loss_function=SquaredError())


def test_an_encoder_of_torch_runs_and_trains_on() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 24, batch_first=True, dropout=0.0)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(7 * WIDTH, 3)).eval()
    model[2].bias.requires_grad_(False)
    inputs = torch.randn(48, 7, WIDTH)
    with torch.no_grad():
        batches = list(zip(inputs.split(16), model(inputs).argmax(-1).split(16), strict=True))
    narrow, report = narrowed(model, batches, keep=0.5)
    assert len(report.removed) == 2
    with torch.inference_mode():
        assert narrow(inputs).isfinite().all()
        padding = torch.zeros(48, 7, dtype=torch.bool)
        padding[:, 5:] = True
        assert narrow[0](inputs, src_key_padding_mask=padding).isfinite().all()
    hesse.finetune(narrow, batches, hesse.Training(steps=2), loss_function=nn.CrossEntropyLoss())
    assert not narrow[2].bias.requires_grad
