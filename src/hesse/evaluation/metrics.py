"""Metrics: the loss of a model's predictions, and their divergence from another model's."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

TOKENS_PER_STEP = 128  # tokens per step: their log-probabilities stay in the caches, and the whole matrix is never held


@dataclass
class PredictionTotals:
    """Sums over tokens of losses, divergences and agreements."""

    tokens: int = 0
    loss: float = 0.0
    reference_loss: float = 0.0
    divergence: float = 0.0
    divergence_square: float = 0.0
    agreement: int = 0
    top5_agreement: float = 0.0

    def add(self, logits: Tensor, ids: Tensor, reference: Tensor | None) -> None:
        """Add the predictions `logits` (samples, tokens, vocabulary) of each next token of `ids` (samples, tokens)."""
        labels = torch.split(ids[:, 1:].flatten(), TOKENS_PER_STEP)
        predicted = torch.split(logits[:, :-1].flatten(0, 1), TOKENS_PER_STEP)
        if reference is None:
            dense: tuple[Tensor | None, ...] = (None,) * len(labels)
        else:
            dense = torch.split(reference[:, :-1].flatten(0, 1), TOKENS_PER_STEP)
        for rows in zip(predicted, labels, dense, strict=True):
            self._add(*rows)

    def mean_divergence(self) -> tuple[float, float]:
        """Return the mean divergence in nats per token, and its standard error over tokens."""
        return _mean(self.divergence, self.divergence_square, self.tokens)

    def _add(self, logits: Tensor, labels: Tensor, reference: Tensor | None) -> None:
        logs = logits.float().log_softmax(-1)
        self.tokens += len(labels)
        self.loss += nn.functional.nll_loss(logs, labels, reduction="sum").item()
        if reference is None:
            return
        dense = reference.float().log_softmax(-1)
        self.reference_loss += nn.functional.nll_loss(dense, labels, reduction="sum").item()
        self.agreement += int((dense.argmax(-1) == logs.argmax(-1)).sum())
        self.top5_agreement += common_share(logs, dense, 5).sum().item()
        divergence = (dense.exp() * (dense - logs)).sum(-1).double()
        self.divergence += divergence.sum().item()
        self.divergence_square += divergence.square().sum().item()


@dataclass
class HiddenTotals:
    """Sums over tokens of the differences between two encoders' last hidden states."""

    tokens: int = 0
    half_square: float = 0.0
    half_square_square: float = 0.0
    reference_square: float = 0.0
    cosine: float = 0.0

    def add(self, hidden: Tensor, reference: Tensor) -> None:
        """Add `hidden` and `reference` (samples, tokens, width)."""
        h, r = (t.double().flatten(0, 1) for t in (hidden, reference))
        self.tokens += len(h)
        errors = 0.5 * (h - r).square().sum(-1)
        self.half_square += errors.sum().item()
        self.half_square_square += errors.square().sum().item()
        self.reference_square += r.square().sum().item()
        self.cosine += torch.nn.functional.cosine_similarity(h, r).sum().item()

    def mean_divergence(self) -> tuple[float, float]:
        """Return the mean of half the squared error, and its standard error over tokens."""
        return _mean(self.half_square, self.half_square_square, self.tokens)


def common_share(logits: Tensor, reference: Tensor, count: int) -> Tensor:
    """Return the share (tokens,) of the reference's `count` likeliest tokens that are among the likeliest of `logits`.

    Both are (tokens, vocabulary); a smaller vocabulary counts whole.
    """
    count = min(count, logits.shape[-1])
    ours, theirs = logits.topk(count).indices, reference.topk(count).indices
    return (theirs[:, :, None] == ours[:, None, :]).any(-1).double().mean(-1)


def _mean(total: float, squares: float, count: int) -> tuple[float, float]:
    """Return the mean of `count` numbers with the given sum and sum of squares, and its standard error."""
    mean = total / count
    return mean, (max(squares / count - mean**2, 0.0) / count) ** 0.5
