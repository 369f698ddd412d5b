"""Losses for exact curvatures: term by term, with the distribution whose likelihood they are."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from hesse.errors import DataError, OptionError, UnsupportedProduct

Reduction = Literal["mean", "sum"]
ROWS = 128  # of logits taken together, so that their copies in float64 stay small


@dataclass(frozen=True, kw_only=True)
class Loss(ABC):
    """A loss that is a sum, or a mean, of terms: one for each sample, and within a sample one for each position.

    The mean is over all terms of all data, not of a batch, so that batches of unequal size count by their terms.
    """

    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        if self.reduction not in ("mean", "sum"):
            raise OptionError(f"the reduction is {self.reduction!r}: a loss with a curvature is a 'mean' or a 'sum'")

    @abstractmethod
    def terms(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each term, (samples, ...); masked ones are 0."""

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Check that outputs and targets fit.

        Raises:
            DataError: their shapes, types or values do not fit.
        """
        return None

    def count(self, targets: Tensor) -> int | None:
        """Return how many terms a mean divides by, if the targets alone determine it."""
        return None

    def output_product(self, outputs: Tensor, targets: Tensor, change: Tensor) -> Tensor:
        """Return the second derivative of the summed terms in the outputs, times `change` (outputs' shape)."""
        with torch.enable_grad():
            point = outputs.detach().requires_grad_()
            (first,) = torch.autograd.grad(self.terms(point, targets).sum(), point, create_graph=True)
            if not first.requires_grad:
                return torch.zeros_like(outputs)
            (second,) = torch.autograd.grad(first, point, change, allow_unused=True)
        return torch.zeros_like(outputs) if second is None else second

    def sample_targets(self, outputs: Tensor, targets: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return targets drawn from the distribution whose negative log-likelihood this loss is; masks stay.

        The generator's numbers are used sample by sample: a batch gets the same labels whole and in parts.
        """
        raise UnsupportedProduct(
            f"{type(self).__name__} is not known to be the likelihood of a distribution, so there is no true Fisher: "
            'use GaussNewton, or Fisher(kind="empirical")'
        )


@dataclass(frozen=True, kw_only=True)
class CrossEntropy(Loss):
    """-log softmax(outputs)[target]; outputs (samples, ..., classes), targets (samples, ...), one term a position.

    Positions whose target is `ignore_index` are masked: no loss, not counted.
    """

    ignore_index: int = -100

    def terms(self, outputs: Tensor, targets: Tensor) -> Tensor:
        flat = nn.functional.cross_entropy(
            outputs.flatten(0, -2), targets.flatten(), reduction="none", ignore_index=self.ignore_index
        )
        return flat.view(targets.shape)

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        if targets.is_floating_point() or targets.shape != outputs.shape[:-1]:
            raise DataError(
                f"targets {tuple(targets.shape)} of {targets.dtype} for outputs {tuple(outputs.shape)}: cross-entropy "
                f"takes the numbers of classes, {tuple(outputs.shape[:-1])} whole numbers; for another loss give loss="
            )
        counted = targets[targets != self.ignore_index]
        wrong = counted[(counted < 0) | (counted >= outputs.shape[-1])]
        if len(wrong):
            raise DataError(f"a target is class {int(wrong[0])}, but the model gives {outputs.shape[-1]} classes")

    def count(self, targets: Tensor) -> int | None:
        return int((targets != self.ignore_index).sum())

    def output_product(self, outputs: Tensor, targets: Tensor, change: Tensor) -> Tensor:
        probabilities = outputs.detach().softmax(-1)
        weighted = probabilities * change
        product = weighted - probabilities * weighted.sum(-1, keepdim=True)
        return product * (targets != self.ignore_index).unsqueeze(-1)

    def sample_targets(self, outputs: Tensor, targets: Tensor, generator: torch.Generator | None) -> Tensor:
        labels = sampled_labels(outputs.detach().flatten(0, -2), generator).view(targets.shape)
        kept: Tensor = torch.where(targets == self.ignore_index, targets, labels)
        return kept


@dataclass(frozen=True, kw_only=True)
class SquaredError(Loss):
    """(output - target)², one term per entry, as torch's MSELoss: the likelihood of Gaussian noise of variance ½."""

    def terms(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if outputs.shape != targets.shape:
            raise OptionError(f"outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)} differ in shape")
        return (outputs - targets).square()

    def count(self, targets: Tensor) -> int | None:
        return targets.numel()

    def output_product(self, outputs: Tensor, targets: Tensor, change: Tensor) -> Tensor:
        return 2 * change

    def sample_targets(self, outputs: Tensor, targets: Tensor, generator: torch.Generator | None) -> Tensor:
        # Sample by sample, so that the numbers do not depend on how samples are batched.
        noise = torch.stack([torch.randn(o.shape, generator=generator, dtype=outputs.dtype) for o in outputs])
        return outputs.detach() + noise.to(outputs.device) * math.sqrt(0.5)


@dataclass(frozen=True, kw_only=True)
class UserLoss(Loss):
    """Any `function(outputs, targets)` that returns one term per sample or position: (samples, ...)."""

    function: Callable[[Tensor, Tensor], Tensor]

    def terms(self, outputs: Tensor, targets: Tensor) -> Tensor:
        terms = self.function(outputs, targets)
        if terms.ndim == 0 or len(terms) != len(outputs):
            raise OptionError(
                f"the loss function gives {tuple(terms.shape)} for {len(outputs)} samples: it must give one term a "
                "sample or a position, not their mean (reduction='none' in torch's losses)"
            )
        return terms


def as_loss(loss: Loss | nn.Module) -> Loss:
    """Return `loss`, or its counterpart here for torch's CrossEntropyLoss and MSELoss.

    Raises:
        OptionError: the loss is another one, or has settings that its counterpart lacks.
    """
    if isinstance(loss, Loss):
        return loss
    if isinstance(loss, nn.CrossEntropyLoss | nn.MSELoss) and loss.reduction not in ("mean", "sum"):
        raise OptionError(f"the loss has reduction={loss.reduction!r}: a loss with a curvature is a 'mean' or a 'sum'")
    if isinstance(loss, nn.CrossEntropyLoss):
        if loss.weight is not None or loss.label_smoothing:
            raise OptionError("a CrossEntropyLoss with class weights or label smoothing: give it as a UserLoss")
        return CrossEntropy(reduction=loss.reduction, ignore_index=loss.ignore_index)  # type: ignore[arg-type]
    if isinstance(loss, nn.MSELoss):
        return SquaredError(reduction=loss.reduction)  # type: ignore[arg-type]
    raise OptionError(f"{type(loss).__name__} is no loss that Hesse knows: give UserLoss(function=...)")


def next_tokens(ids: Tensor, ignore_index: int = -100) -> Tensor:
    """Return a language model's targets for `ids` (samples, tokens): the token after each, and none after the last.

    Tokens that `hide_from_loss` hid are no targets.
    """
    return torch.cat([scored_tokens(ids[:, 1:], ignore_index), torch.full_like(ids[:, :1], ignore_index)], dim=1)


def scored_tokens(ids: Tensor, ignore_index: int = -100) -> Tensor:
    """Return `ids` with `ignore_index` in place of the tokens that `hide_from_loss` hid."""
    return ids.masked_fill(ids < 0, ignore_index)


def hide_from_loss(ids: Tensor, scored: Tensor) -> Tensor:
    """Return `ids` with the tokens that are not `scored` as -1 - id, so that ids and mask are batched as one tensor."""
    return torch.where(scored, ids, -1 - ids)


def input_ids(ids: Tensor) -> Tensor:
    """Return the ids that a model reads, of ids some of which `hide_from_loss` hid."""
    return torch.where(ids < 0, -1 - ids, ids)


def sampled_labels(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return a label for each row of `logits` (tokens, vocabulary), drawn from its softmax by inverse sampling.

    One random number per token, whatever the size of the vocabulary.
    """
    labels = []
    for rows in torch.split(logits, ROWS):
        cumulative = rows.double().softmax(-1).cumsum(-1)
        drawn = torch.rand(len(rows), 1, dtype=torch.float64, generator=generator).to(logits.device)
        labels.append(torch.searchsorted(cumulative, drawn * cumulative[:, -1:], right=True).flatten())
    return torch.cat(labels)
