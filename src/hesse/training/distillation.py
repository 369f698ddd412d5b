"""Distillation: use the dense model's outputs as additional targets."""

from dataclasses import dataclass

from torch import Tensor

from hesse.curvature import CrossEntropy, Loss, SquaredError
from hesse.errors import OptionError


@dataclass(frozen=True)
class Distillation:
    """Loss (1 - share) · task + share · divergence from the teacher, term by term.

    For a cross-entropy the divergence is temperature² · KL(teacher || model) of both distributions at `temperature`;
    for a squared error it is the squared difference of the outputs, without a temperature. Masked positions are not
    counted in either term. Source: Hinton et al., 2015, arXiv:1503.02531.
    """

    share: float = 0.5
    temperature: float = 2.0

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise OptionError(f"the share of distillation is {self.share}, but must be between 0 and 1")
        if not self.temperature > 0:
            raise OptionError(f"the temperature of distillation is {self.temperature}, but must be above 0; 2 is usual")

    def check(self, loss: Loss) -> None:
        """Check that the divergence for a loss is known.

        Raises:
            OptionError: the loss is neither a cross-entropy nor a squared error.
        """
        if not isinstance(loss, CrossEntropy | SquaredError):
            raise OptionError(
                f"there is no distillation for a {type(loss).__name__}: use CrossEntropy or SquaredError, or put the "
                "teacher into the loss function"
            )

    def terms(self, loss: Loss, outputs: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each term, in the shape of the task loss's terms."""
        return (1 - self.share) * loss.terms(outputs, targets) + self.share * self._divergence(
            loss, outputs, teacher, targets
        )

    def _divergence(self, loss: Loss, outputs: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
        if not isinstance(loss, CrossEntropy):
            return (outputs - teacher).square()
        ours = (outputs / self.temperature).log_softmax(-1)
        theirs = (teacher / self.temperature).log_softmax(-1)
        divergence = (theirs.exp() * (theirs - ours)).sum(-1) * self.temperature**2
        return divergence * (targets != loss.ignore_index)
