"""A budget of bytes, bits or loss, and the request to meet it."""

from dataclasses import dataclass

from hesse.errors import OptionError
from hesse.methods import Method, Options, methods_of
from hesse.planning.sizes import read_size
from hesse.scores.sensitivities import Sensitivity, find_sensitivity


@dataclass(frozen=True)
class Budget:
    """A budget: exactly one of a size, mean bits and a loss.

    Raises:
        OptionError: none or more than one is given, or its value is invalid.
    """

    size: str | int | None = None  # of the weights' files: "40%" of the dense files, "5MB", or bytes
    bits: float | None = None  # per weight of the planned layers, including scales and zero points
    loss: float | None = None  # the largest predicted loss increase, nats per token

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.size, self.bits, self.loss)) != 1:
            raise OptionError("give one budget: a size, mean bits, or a loss")
        for name, value in (("bits", self.bits), ("loss", self.loss)):
            if value is not None and not 0 < value < float("inf"):
                raise OptionError(f"--{name} is {value}: give a number above 0")
        if self.size is not None:
            self.bytes_of(1)

    def bytes_of(self, whole: int) -> int:
        """Return the size in bytes, for a model whose files have `whole` bytes."""
        text = str(self.size).strip()
        found = read_size(text, percent=whole / 100)
        if not found:
            raise OptionError(f"--size is {text!r}: give a share such as 40%, or bytes such as 5MB or 1.5GB")
        return int(found)


@dataclass(frozen=True)
class BudgetRequest:
    """A budget, and the method and options to meet it; given `options` hold for all layers."""

    budget: Budget
    method: Method
    options: Options
    ignore: tuple[str, ...]
    target: str | None  # None: transformers
    allocation: str | None  # the name of a predictor of costs; None: solve each layer for each choice

    @property
    def _allocation_row(self) -> Method | None:
        rows = methods_of("allocate") | methods_of("price")
        return None if self.allocation is None else rows.get(self.allocation)

    @property
    def planner(self) -> str:
        """Return the planner of the allocation's row."""
        return "knapsack" if self._allocation_row is None else self._allocation_row.solver

    @property
    def sensitivity(self) -> Sensitivity | None:
        """Return the predictor.

        Raises:
            OptionError: there is none of that name, or its costs are no nats, in which the budget is.
        """
        if self.allocation is None:
            return None
        row = self._allocation_row
        found = find_sensitivity(self.allocation if row is None or row.score is None else row.score)
        if found.shards:
            raise OptionError(
                f"--allocation {found.name} compares parts of the data, which the walk over a checkpoint does not keep "
                "apart: use hawq or hawq-v2, or hesse.planning.allocate on a module in memory"
            )
        if self.budget.loss is not None and not found.nats:
            raise OptionError(f"--allocation {found.name} ranks layers and predicts no loss: give --size or --bits")
        return found
