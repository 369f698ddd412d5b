"""Small networks of several kinds, with losses and batches of unequal size, for checks against dense autograd."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hesse.curvature import CrossEntropy, Loss, Objective, SquaredError, UserLoss
from hesse.testing import normal

CLASSES = 3


class Attention(nn.Module):
    """Embedding, norm, attention, and a head that shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, 4)
        self.norm = nn.LayerNorm(4)
        self.project = nn.Linear(4, 12, bias=False)
        self.head = nn.Linear(4, CLASSES, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.norm(self.embedding(ids))
        query, key, value = self.project(hidden).chunk(3, dim=-1)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        result: Tensor = self.head(nn.functional.silu(mixed) + hidden)
        return result


class Recurrent(nn.Module):
    """torch's fused LSTM, which has no forward mode."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.LSTM(2, 2, batch_first=True)
        self.head = nn.Linear(2, CLASSES)

    def forward(self, values: Tensor) -> Tensor:
        result: Tensor = self.head(self.steps(values)[0])
        return result


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.SiLU(), nn.Linear(3, CLASSES))


def conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 2), nn.GroupNorm(1, 2), nn.GELU(), nn.Flatten(), nn.Linear(8, CLASSES))


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, CLASSES))


@dataclass(frozen=True)
class Setting:
    """A network, inputs of 5 samples, and the shape of a sample's positions."""

    build: Callable[[], nn.Module]
    inputs: Tensor
    positions: tuple[int, ...] = ()


SETTINGS = {
    "mlp": Setting(mlp, normal(0, 5, 2)),
    "conv": Setting(conv, normal(1, 5, 1, 3, 3)),
    "attention": Setting(Attention, torch.tensor([[0, 1, 2], [2, 2, 1], [0, 0, 1], [1, 0, 2], [2, 1, 0]]), (3,)),
    "recurrent": Setting(Recurrent, normal(3, 5, 3, 2), (3,)),
    "linear": Setting(linear, normal(2, 5, 2)),
}
LOSSES: dict[str, Callable[[str], Loss]] = {
    "cross-entropy": lambda reduction: CrossEntropy(reduction=reduction),  # type: ignore[arg-type]
    "squared error": lambda reduction: SquaredError(reduction=reduction),  # type: ignore[arg-type]
    "user": lambda reduction: UserLoss(
        reduction=reduction,  # type: ignore[arg-type]
        function=lambda outputs, targets: (outputs.cosh() + outputs * targets).flatten(1).sum(1),
    ),
}


def make(setting: str, loss: str, reduction: str = "mean", dtype: torch.dtype = torch.float64) -> Objective:
    """Batches of 2, 2 and 1 samples; with cross-entropy one position is masked."""
    torch.manual_seed(0)
    chosen = SETTINGS[setting]
    model = chosen.build().to(dtype)
    inputs = chosen.inputs.to(dtype) if chosen.inputs.is_floating_point() else chosen.inputs
    shape = (5, *chosen.positions)
    if loss == "cross-entropy":
        targets = torch.randint(0, CLASSES, shape, generator=torch.Generator().manual_seed(1))
        targets.view(-1)[1] = -100
    else:
        targets = normal(3, *shape, CLASSES).to(dtype)
    return Objective.of(model, LOSSES[loss](reduction), list(zip(inputs.split(2), targets.split(2), strict=True)))


def everything(objective: Objective) -> tuple[Tensor, Tensor]:
    """All data as one batch."""
    inputs, targets = zip(*objective.batches(), strict=True)
    return torch.cat(inputs), torch.cat(targets)
