"""Protocol of a partition: sets of parameter entries that are kept, removed or changed together."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from hesse.errors import OptionError

Shapes = Mapping[str, torch.Size]  # by parameter


class Partition(ABC):
    """Partition of named parameters of a network into parts, numbered from 0.

    Two products say everything about the parts: `sums_of_samples` adds up the entries of each part, and `spread` puts
    a number of each part at all of its entries. The parts are disjoint; `check` tests that. `hesse.testing` has the
    laws (`PartitionLaws`) that each class inherits.

    `kind` names what a part is: "weights", "rows", "heads", "layers", "blocks" and so on. Sums are taken in
    `precision`; None leaves tensors in the type that they have.
    """

    precision: torch.dtype | None = None

    @property
    @abstractmethod
    def kind(self) -> str:
        """Return the name of the parts, in the plural."""

    @property
    @abstractmethod
    def count(self) -> int:
        """Return the number of parts."""

    @property
    @abstractmethod
    def shapes(self) -> Shapes:
        """Return the shapes of all parameters with entries in a part."""

    @abstractmethod
    def sums_of_samples(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return sums over each part's entries (samples, parts) of tensors (samples, *shape) of some parameters."""

    @abstractmethod
    def spread(self, values: Tensor, like: Mapping[str, Tensor], other: float = 0.0) -> dict[str, Tensor]:
        """Return tensors with each part's value, of `values` (parts,), at its entries and `other` at all others.

        `like` gives the type and the device of each parameter's result.
        """

    def restricted(self, role: str) -> "Partition":
        """Return the same parts with the entries of one role alone: "produced", "outgoing" or "everything".

        A partition whose parts have no roles is the same for each.
        """
        return self

    def sums(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return sums over each part's entries (parts,) of tensors of some parameters' shapes."""
        return self.sums_of_samples({name: tensor.unsqueeze(0) for name, tensor in tensors.items()})[0]

    def exact(self, tensor: Tensor) -> Tensor:
        """Return the tensor in the precision of this partition's sums."""
        return tensor if self.precision is None else tensor.to(self.precision)

    def sizes(self) -> Tensor:
        """Return the number of entries of each part (parts,), in float64."""
        return self.sums({name: torch.ones(shape, dtype=torch.float64) for name, shape in self.shapes.items()})

    def masks(self, parts: Sequence[int]) -> dict[str, Tensor]:
        """Return for each parameter a mask that is true at the entries of some parts."""
        chosen = torch.zeros(self.count)
        chosen[list(parts)] = 1
        like = {name: torch.empty(shape) for name, shape in self.shapes.items()}
        return {name: mask > 0 for name, mask in self.spread(chosen, like).items()}

    def check(self, covers: Sequence[str] = ()) -> None:
        """Check that the parts are disjoint, and that they cover the parameters `covers` whole.

        Numbers of the parts are spread over their entries and summed again: the sum is the number times the size if and
        only if no entry is in a second part.

        Raises:
            OptionError: an entry is in two parts, or in none of them.
        """
        like = {name: torch.empty(shape, dtype=torch.float64) for name, shape in self.shapes.items()}
        numbers = torch.arange(1, self.count + 1, dtype=torch.float64)
        spread, sizes = self.spread(numbers, like), self.sizes()
        wrong = (self.sums(spread) != numbers * sizes).nonzero().flatten().tolist()
        if wrong:
            raise OptionError(f"part {wrong[0]} of the {self.kind} shares entries with another part")
        for name in covers:
            if name not in spread or bool((spread[name] == 0).any()):
                raise OptionError(f"the {self.kind} do not cover {name}")
        if float(sizes.sum()) > sum(prod(shape) for shape in self.shapes.values()):
            raise OptionError(f"the {self.kind} have more entries than their parameters")
