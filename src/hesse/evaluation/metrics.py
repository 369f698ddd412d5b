"""Metrics: the loss of a model's predictions, and their divergence from another model's."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hesse.evaluation.measurements import MeasuredMean
from hesse.networks.network import Network

IGNORED = -100  # a target that is not scored
TOKENS_PER_STEP = 128  # tokens per step: their log-probabilities stay in the caches, and the whole matrix is never held


@dataclass
class Totals(ABC):
    """Sums over tokens of the divergences between two models' outputs."""

    tokens: int = 0
    divergence: float = 0.0
    divergence_square: float = 0.0

    @abstractmethod
    def add(self, output: Tensor, targets: Tensor, reference: Tensor | None) -> None:
        """Add the `output` of a model that is to predict `targets` (samples, tokens), and the reference's."""

    @abstractmethod
    def quality(self) -> dict[str, float]:
        """Return the fields of an `Evaluation` that follow from the sums."""

    def mean_divergence(self) -> MeasuredMean:
        """Return the mean divergence: in nats per token, or of half the squared error of hidden states."""
        mean = self.divergence / self.tokens
        variance = max(self.divergence_square / self.tokens - mean**2, 0.0)
        return MeasuredMean(mean, (variance / self.tokens) ** 0.5)

    def _add_divergences(self, divergences: Tensor) -> None:
        self.divergence += divergences.sum().item()
        self.divergence_square += divergences.square().sum().item()


@dataclass
class PredictionTotals(Totals):
    """Sums of losses, divergences and agreements of predictions, which are logits (samples, tokens, vocabulary)."""

    loss: float = 0.0
    reference_loss: float = 0.0
    agreement: int = 0
    top5_agreement: float = 0.0
    compared: bool = False  # with a reference

    def add(self, output: Tensor, targets: Tensor, reference: Tensor | None) -> None:
        labels, logits = targets.flatten(), output.flatten(0, 1)
        dense = None if reference is None else reference.flatten(0, 1)
        scored = (labels != IGNORED).nonzero().flatten()
        for some in torch.split(scored, TOKENS_PER_STEP) if len(scored) else ():
            self._add(logits[some], labels[some], None if dense is None else dense[some])

    def quality(self) -> dict[str, float]:
        loss = self.loss / self.tokens
        found = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        if self.compared:
            reference, mean = self.reference_loss / self.tokens, self.mean_divergence()
            found |= {"reference_loss": reference, "loss_increase": loss - reference, "kl": mean.value}
            found |= {"kl_standard_error": mean.standard_error, "top1_agreement": self.agreement / self.tokens}
            found |= {"top5_agreement": self.top5_agreement / self.tokens}
        return found

    def _add(self, logits: Tensor, labels: Tensor, reference: Tensor | None) -> None:
        logs = logits.float().log_softmax(-1)
        self.tokens += len(labels)
        self.loss += nn.functional.nll_loss(logs, labels, reduction="sum").item()
        if reference is None:
            return
        self.compared = True
        dense = reference.float().log_softmax(-1)
        self.reference_loss += nn.functional.nll_loss(dense, labels, reduction="sum").item()
        self.agreement += int((dense.argmax(-1) == logs.argmax(-1)).sum())
        self.top5_agreement += common_share(logs, dense, 5).sum().item()
        self._add_divergences((dense.exp() * (dense - logs)).sum(-1).double())


@dataclass
class HiddenTotals(Totals):
    """Sums of the differences between two encoders' last hidden states (samples, tokens, width)."""

    reference_square: float = 0.0
    cosine: float = 0.0

    def add(self, output: Tensor, targets: Tensor, reference: Tensor | None) -> None:
        assert reference is not None, "an encoder is only compared"
        h, r = (t.double().flatten(0, 1) for t in (output, reference))
        self.tokens += len(h)
        self._add_divergences(0.5 * (h - r).square().sum(-1))
        self.reference_square += r.square().sum().item()
        self.cosine += torch.nn.functional.cosine_similarity(h, r).sum().item()

    def quality(self) -> dict[str, float]:
        return {
            "hidden_error": self.divergence / self.tokens,
            "hidden_relative_error": 2 * self.divergence / self.reference_square,
            "hidden_cosine": self.cosine / self.tokens,
        }


def common_share(logits: Tensor, reference: Tensor, count: int) -> Tensor:
    """Return the share (tokens,) of the reference's `count` likeliest tokens that are among the likeliest of `logits`.

    Both are (tokens, vocabulary); a smaller vocabulary counts whole.
    """
    count = min(count, logits.shape[-1])
    ours, theirs = logits.topk(count).indices, reference.topk(count).indices
    return (theirs[:, :, None] == ours[:, None, :]).any(-1).double().mean(-1)


def totals_of(network: Network) -> Totals:
    """Return empty totals for the outputs of a network of this kind."""
    return HiddenTotals() if network.kind == "encoder" else PredictionTotals()
