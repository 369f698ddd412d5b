"""Networks and data of the curvature benchmark, the same numbers in every program's environment."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]
VOCABULARY, LENGTH = 2048, 128
SMALL = 64  # samples for agreement: more than a layer has inputs, else eigenvectors of no variance are arbitrary
BLOCK_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Problem:
    """A network with cross-entropy over batches of inputs and labels; outputs (samples, ..., classes)."""

    model: nn.Module
    batches: list[Batch]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters, in the model's order."""
        return list(self.model.parameters())

    def vectors(self, number: int) -> Tensor:
        """Random right-hand sides (number, parameters)."""
        size = sum(p.numel() for p in self.parameters)
        return torch.randn(number, size, generator=_generator(2), dtype=torch.float32).to(self.parameters[0])

    def split(self, vector: Tensor) -> list[Tensor]:
        """A flat vector as one tensor a parameter."""
        pieces = vector.split([p.numel() for p in self.parameters])
        return [piece.view_as(p) for piece, p in zip(pieces, self.parameters, strict=True)]

    def whole(self) -> Batch:
        """All data as one batch."""
        inputs, labels = zip(*self.batches, strict=True)
        return torch.cat(inputs), torch.cat(labels)

    def flat(self) -> Problem:
        """The same with each position a row of the outputs, for programs that know outputs (rows, classes) only."""
        return Problem(_Rows(self.model), [(inputs, labels.flatten()) for inputs, labels in self.batches])

    def forward_backward(self) -> None:
        """One plain gradient over all data."""
        for inputs, labels in self.batches:
            logits = self.model(inputs)
            nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum").backward()
            self.model.zero_grad()

    def gradient(self, name: str) -> Tensor:
        """The summed loss's gradient for the parameter `name`'s first batch, a typical right-hand side."""
        inputs, labels = self.batches[0]
        loss = nn.functional.cross_entropy(self.model(inputs).flatten(0, -2), labels.flatten())
        (gradient,) = torch.autograd.grad(loss, self.model.get_parameter(name))
        return gradient


class _Rows(nn.Module):
    """Outputs (samples, positions, classes) as (samples · positions, classes)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(inputs).flatten(0, -2)


class Logits(nn.Module):
    """A causal language model that gives a tensor."""

    def __init__(self, language_model: nn.Module) -> None:
        super().__init__()
        self.language_model = language_model

    def forward(self, ids: Tensor) -> Tensor:
        return self.language_model(input_ids=ids, use_cache=False).logits


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _filled(model: nn.Module) -> nn.Module:
    """The model with weights that do not depend on how a release of torch or transformers starts them."""
    generator = _generator(0)
    for p in model.parameters():
        with torch.no_grad():
            if p.ndim == 1:
                p.fill_(1.0 if p.max() == p.min() == 1 else 0.0)  # a norm's weight, or a bias
            else:
                p.copy_(torch.randn(p.shape, generator=generator) / p[0].numel() ** 0.5)
    return model.eval()


def llama(samples: int, batch: int, attention: str, *, layers: int = 6) -> Problem:
    """A small Llama, and random tokens with the next one as the label of each position."""
    # Some peers bring a torchvision along, which a torch without CUDA cannot load: transformers need not see it.
    sys.modules.setdefault("torchvision", None)  # type: ignore[arg-type]
    from transformers import LlamaConfig, LlamaForCausalLM  # not in the environments of programs that never see it

    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
        attn_implementation=attention,
    )
    ids = torch.randint(0, VOCABULARY, (samples, LENGTH + 1), generator=_generator(1))
    batches = list(zip(ids[:, :-1].split(batch), ids[:, 1:].split(batch), strict=True))
    return Problem(_filled(Logits(LlamaForCausalLM(config))), batches)


def mlp(samples: int = 1024, batch: int = 256, width: int = 640) -> Problem:
    """A multilayer perceptron of a million parameters."""
    layers = [nn.Linear(256, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()]
    layers += [nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10)]
    return _classified(nn.Sequential(*layers), (256,), samples, batch, 10)


def conv(samples: int = 512, batch: int = 128, width: int = 32) -> Problem:
    """A convolutional network with padding."""
    layers = [nn.Conv2d(3, width, 3, padding=1), nn.GELU(), nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)]
    layers += [nn.GELU(), nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1), nn.GELU()]
    layers += [nn.Flatten(), nn.Linear(2 * width * 64, 10)]
    return _classified(nn.Sequential(*layers), (3, 32, 32), samples, batch, 10)


def small_mlp() -> Problem:
    """For agreement, in float64 and without biases, which programs place differently."""
    layers = [nn.Linear(12, 16, bias=False), nn.Tanh(), nn.Linear(16, 8, bias=False), nn.Tanh()]
    return _classified(nn.Sequential(*layers, nn.Linear(8, 5, bias=False)), (12,), SMALL, 16, 5, torch.float64)


def small_conv() -> Problem:
    """For agreement: weights shared over places, and one label a sample."""
    layers = [nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.Tanh()]
    layers += [nn.Conv2d(4, 6, 3, padding=1, stride=2, bias=False), nn.Tanh(), nn.Flatten()]
    return _classified(nn.Sequential(*layers, nn.Linear(96, 5, bias=False)), (2, 8, 8), SMALL, 16, 5, torch.float64)


def small_tokens() -> Problem:
    """For agreement: weights shared over positions, and one label a position."""
    layers = [nn.Linear(12, 16, bias=False), nn.Tanh(), nn.Linear(16, 5, bias=False)]
    model = _filled(nn.Sequential(*layers)).double()
    inputs = torch.randn(SMALL, 7, 12, generator=_generator(1)).double()
    labels = torch.randint(0, 5, (SMALL, 7), generator=_generator(3))
    return Problem(model, list(zip(inputs.split(16), labels.split(16), strict=True)))


def _classified(
    model: nn.Module, shape: tuple[int, ...], samples: int, batch: int, classes: int, dtype: Any = torch.float32
) -> Problem:
    """Random inputs of `shape` and random labels."""
    inputs = torch.randn(samples, *shape, generator=_generator(1)).to(dtype)
    labels = torch.randint(0, classes, (samples,), generator=_generator(3))
    return Problem(_filled(model).to(dtype), list(zip(inputs.split(batch), labels.split(batch), strict=True)))


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "mlp": mlp,
    "conv": conv,
    "llama": lambda: llama(128, 16, "sdpa"),
    "llama_eager": lambda: llama(16, 4, "eager"),
    "llama_sdpa": lambda: llama(16, 4, "sdpa"),
    "small_mlp": small_mlp,
    "small_conv": small_conv,
    "small_tokens": small_tokens,
}
QUICK: dict[str, Callable[[], Problem]] = PROBLEMS | {
    "mlp": lambda: mlp(64, 32, 64),
    "conv": lambda: conv(32, 16, 8),
    "llama": lambda: llama(8, 4, "sdpa", layers=1),
    "llama_eager": lambda: llama(4, 2, "eager", layers=1),
    "llama_sdpa": lambda: llama(4, 2, "sdpa", layers=1),
}


def block_layers(model: nn.Module) -> list[str]:
    """The linear layers inside a Llama's blocks, by name; for other networks all layers with a weight."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    return [name for name in linear if name.rpartition(".")[2] in BLOCK_LAYERS] or linear
