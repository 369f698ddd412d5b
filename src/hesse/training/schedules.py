"""Schedules of gradual pruning: its steps, the sparsity of each, and the learning rate between them."""

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property

from hesse.errors import OptionError
from hesse.registry import Registry


@dataclass(frozen=True)
class GradualSchedule:
    """Evenly spaced cuts over the first steps of a training, to shares of zeros that increase ever more slowly.

    The k-th of n cuts prunes to final + (first - final) (1 - k / (n - 1))³: the first cut, before any training, to
    `first`, and the last to `final`. The share `rest` of the steps comes after the last cut. Between two cuts the
    learning rate decreases from its full value to the share `floor` of it, and after the last cut to 0.
    Sources: Zhu and Gupta, 2017, arXiv:1710.01878; the large first cut and the rewound rate, Kurtic and Alistarh, 2022,
    arXiv:2210.06384.
    """

    final: float
    steps: int
    cuts: int = 10
    first: float = 0.5
    rest: float = 0.3
    floor: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.final < 1:
            raise OptionError(f"the final sparsity is {self.final}, but must be between 0 and 1, such as 0.9")
        if not 0 <= self.first <= self.final:
            raise OptionError(f"the first cut is to {self.first}, but must be between 0 and the final {self.final}")
        if not (0 <= self.rest < 1 and 0 <= self.floor <= 1):
            raise OptionError(f"rest is {self.rest} and floor {self.floor}, but both are shares between 0 and 1")
        if self.cuts < 1 or len(set(self.cut_steps)) < self.cuts:
            raise OptionError(
                f"{self.cuts} cuts do not fit into {self.steps} steps, of which {self.rest:.0%} come after the last: "
                "use fewer cuts or more steps"
            )

    @cached_property
    def cut_steps(self) -> tuple[int, ...]:
        """Return the steps before which the schedule prunes; the first is 0."""
        last = min(round(self.steps * (1 - self.rest)), self.steps - 1)  # a step comes after it
        return tuple(k * last // max(self.cuts - 1, 1) for k in range(self.cuts))

    @cached_property
    def shares(self) -> tuple[float, ...]:
        """Return the share of zeros after each cut."""
        if self.cuts == 1:
            return (self.final,)
        left = [(1 - k / (self.cuts - 1)) ** 3 for k in range(self.cuts)]
        return tuple(self.final + (self.first - self.final) * share for share in left)

    def share(self, step: int) -> float:
        """Return the share of zeros in a step."""
        return self.shares[bisect_right(self.cut_steps, step) - 1]

    def rate(self, step: int, steps: int) -> float:
        """Return the factor of the learning rate in a step of `steps`, for `Training`."""
        stretch = bisect_right(self.cut_steps, step) - 1
        begin = self.cut_steps[stretch]
        last = stretch == self.cuts - 1
        end, floor = (self.steps, 0.0) if last else (self.cut_steps[stretch + 1], self.floor)
        return 1 - (1 - floor) * (step - begin) / (end - begin)


SCHEDULES: Registry[type[GradualSchedule]] = Registry("schedule")
SCHEDULES.register("cubic", GradualSchedule)
