"""scikit-learn's handwritten digits, and small networks that learn them in seconds."""

import math
from collections.abc import Callable
from copy import deepcopy
from functools import cache

import pytest
import torch
from torch import Tensor, nn

datasets = pytest.importorskip("sklearn.datasets")

CLASSES, SIDE, BATCH = 10, 8, 64
Batches = list[tuple[Tensor, Tensor]]


@cache
def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images (samples, 1, 8, 8) between -1 and 1 and their classes: 1297 to train on, 500 to test with."""
    found = datasets.load_digits()
    images = torch.from_numpy(found.images).float().unsqueeze(1) / 8 - 1
    labels = torch.from_numpy(found.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[500:], order[:500]
    return (images[train], labels[train]), (images[test], labels[test])


def batches(part: str = "train", samples: int | None = None) -> Batches:
    """The first `samples` of a part, "train" or "test", as pairs of images and classes, 64 a batch."""
    images, labels = digits()[part == "test"]
    return list(zip(images[:samples].split(BATCH), labels[:samples].split(BATCH), strict=True))


class Residual(nn.Module):
    """Two convolutions with norms beside a shortcut, which a third takes to another width or size."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.norm2(self.conv2(self.norm1(self.conv1(images)).relu()))
        result: Tensor = (hidden + self.shortcut(images)).relu()
        return result


class ConvNet(nn.Module):
    """A residual network of 20 thousand parameters."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.block1 = Residual(width, width, 1)
        self.block2 = Residual(width, 2 * width, 2)
        self.head = nn.Linear(2 * width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = self.head(self.block2(self.block1(self.stem(images))).mean((2, 3)))
        return result


class Attention(nn.Module):
    """Attention among all patches."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, hidden: Tensor) -> Tensor:
        parts = [
            linear(hidden).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        ]
        mixed = nn.functional.scaled_dot_product_attention(*parts)
        result: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return result


class Encoder(nn.Module):
    """One block of a transformer, norms first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.attention(self.norm1(hidden))
        result: Tensor = hidden + self.down(nn.functional.gelu(self.up(self.norm2(hidden))))
        return result


class VisionTransformer(nn.Module):
    """Patches of 2 x 2 pixels, two blocks, the mean over patches: 18 thousand parameters."""

    def __init__(self, width: int = 32, heads: int = 4, blocks: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, 2)
        self.positions = nn.Parameter(torch.randn(1, SIDE * SIDE // 4, width) * 0.1)
        self.blocks = nn.Sequential(*(Encoder(width, heads) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        result: Tensor = self.head(self.norm(self.blocks(hidden)).mean(1))
        return result


def mlp() -> nn.Module:
    """Three layers, the hidden ones 64 wide."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(SIDE * SIDE, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, CLASSES)
    )


NETS: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, "conv": ConvNet, "vit": VisionTransformer}
EPOCHS = {"mlp": 16, "conv": 8, "vit": 16}  # 1 to 3 seconds on one thread


def train(model: nn.Module, epochs: int, rate: float = 4e-3, seed: int = 0) -> nn.Module:
    """Train by Adam with a rate that falls to nothing; in eval mode afterwards."""
    (images, labels), _ = digits()
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(model.parameters(), rate)
    steps = epochs * (-(-len(labels) // BATCH))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / steps))
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(labels), generator=generator).split(BATCH):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimiser.step()
            schedule.step()
    return model.eval()


@cache
def _trained(name: str) -> nn.Module:
    torch.manual_seed(0)
    return train(NETS[name](), EPOCHS[name])


def trained(name: str) -> nn.Module:
    """A copy of the network of that name ("mlp", "conv", "vit"), trained once a session, in eval mode."""
    return deepcopy(_trained(name))


def accuracy(model: nn.Module, part: str = "test") -> float:
    """The share of images of a part whose class is found."""
    images, labels = digits()[part == "test"]
    with torch.no_grad():
        return float((model(images).argmax(-1) == labels).double().mean())
