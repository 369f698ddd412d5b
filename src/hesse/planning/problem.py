"""What is shared: groups of layers, what may be done to each, and what choices cost together."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from hesse.errors import OptionError

Matrix = NDArray[np.float64]
Choice = tuple[int, ...]  # for each group the place of its candidate


@dataclass(frozen=True)
class Candidate:
    """One thing that may be done to a group of layers."""

    label: str
    size: int  # bytes that the group's layers then take, scales and zero points included
    loss: float  # nats per token that it costs alone, 0 or more


@dataclass(frozen=True)
class Group:
    """Layers that share one scheme."""

    name: str
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True, eq=False)
class Problem:
    """Groups to choose for, and how their errors add up.

    With s_i the square root of what the choice for group i costs alone, all choices together cost sᵀ R s nats per token.
    R (groups, groups) are the `correlations` of the changes' effects on the model's outputs, with ones on the diagonal;
    the identity is the sum of the single costs, which is what layer-wise sensitivities assume.

    Raises:
        OptionError: a group has no candidates, a loss is negative or not finite, or R is no correlation matrix.
    """

    groups: tuple[Group, ...]
    correlations: Matrix

    def __post_init__(self) -> None:
        count, matrix = len(self.groups), self.correlations
        for group in self.groups:
            if not group.candidates:
                raise OptionError(f"{group.name} has no candidates to choose among")
            for candidate in group.candidates:
                if not (np.isfinite(candidate.loss) and candidate.loss >= 0):
                    raise OptionError(f"{group.name}: {candidate.label} costs {candidate.loss}: give 0 or more nats")
        if matrix.shape != (count, count) or not np.allclose(matrix, matrix.T) or not np.allclose(np.diag(matrix), 1):
            raise OptionError(f"correlations of {count} groups are a symmetric matrix with ones on its diagonal")
        if self.lowest_eigenvalue < -1e-6:
            raise OptionError(f"correlations have no negative eigenvalue, but these have {self.lowest_eigenvalue:.3g}")

    @staticmethod
    def additive(groups: tuple[Group, ...]) -> "Problem":
        """Groups whose costs simply add up."""
        return Problem(groups, np.eye(len(groups)))

    @cached_property
    def lowest_eigenvalue(self) -> float:
        """Of the correlations."""
        return float(np.linalg.eigvalsh(self.correlations)[0]) if self.groups else 1.0

    def size(self, choice: Choice) -> int:
        """Bytes of all groups together."""
        return sum(group.candidates[index].size for group, index in zip(self.groups, choice, strict=True))

    def loss(self, choice: Choice) -> float:
        """Predicted loss increase of all choices together, in nats per token."""
        roots = np.sqrt([g.candidates[index].loss for g, index in zip(self.groups, choice, strict=True)])
        return float(roots @ self.correlations @ roots)

    @property
    def smallest(self) -> int:
        """Bytes where every group takes its smallest candidate."""
        return sum(min(candidate.size for candidate in group.candidates) for group in self.groups)

    @property
    def largest(self) -> int:
        """Bytes above which nothing more is gained: every group at the cheapest size of its least loss."""
        return sum(min((c.loss, c.size) for c in group.candidates)[1] for group in self.groups)
