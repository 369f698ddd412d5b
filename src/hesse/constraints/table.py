"""S = values of one fixed table times a scale a group: floating point numbers of few bits, NF4."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from hesse.constraints.base import round_to
from hesse.constraints.grouped import Grouped, Scales
from hesse.errors import OptionError


def floats(exponent: int, mantissa: int) -> tuple[float, ...]:
    """Return all finite values, ascending, of a format with a sign and these bits of exponent and mantissa.

    With subnormals and without infinities, as E2M1 of OCP's microscaling formats; without the largest of E4M3,
    which encodes NaN there.
    """
    bias = (1 << (exponent - 1)) - 1
    positive = []
    for power in range(1 << exponent):
        for fraction in range(1 << mantissa):
            lead = fraction / (1 << mantissa) + (1 if power else 0)
            positive.append(lead * 2.0 ** (max(power, 1) - bias))
    if (exponent, mantissa) == (4, 3):
        positive = positive[:-1]
    return tuple(sorted({sign * value for sign in (-1.0, 1.0) for value in positive}))


def normal_floats(bits: int) -> tuple[float, ...]:
    """Return the values of NF4 and its relatives: quantiles of a normal distribution, with ±1 at the ends.

    There is one more value above 0 than below (8 and 7).

    Source: QLoRA (Dettmers et al., 2023), appendix E; for other bits LQ-LoRA (Guo et al., 2023).
    """
    half = 1 << (bits - 1)
    offset = 0.5 * (1 / (4 * half) + 1 / (4 * half - 2))
    normal = torch.distributions.Normal(torch.tensor(0.0).double(), torch.tensor(1.0).double())
    above, below = (
        normal.icdf(torch.linspace(1 - offset, 0.5, count).double()[:-1])  # type: ignore[no-untyped-call]
        for count in (half + 1, half)
    )
    values = torch.cat([-below, torch.zeros(1).double(), above]).sort().values
    return tuple((values / values.amax()).tolist())


TABLES = {
    "fp4": floats(2, 1),
    "fp6": floats(2, 3),
    "fp8": floats(4, 3),
    "nf2": normal_floats(2),
    "nf3": normal_floats(3),
    "nf4": normal_floats(4),
}


@dataclass(frozen=True, eq=True)
class Table(Grouped):
    """The values of a named table, times a scale for every `group_size` columns.

    The tables are floats (fp4: E2M1, fp6: E2M3, fp8: E4M3) and normal floats (nf2, nf3, nf4).

    The scale takes a group's largest |w| to the table's largest value. Codes are indices into the table's ascending
    values, minus 2^(bits-1). Source of comparing such formats: Aggarwal et al., 2023 (minifloats); QLoRA for NF4.
    """

    name: str = "fp4"
    group_size: int = 128
    symmetric = True  # no zero points

    def __post_init__(self) -> None:
        if self.name not in TABLES:
            raise OptionError(f"there is no table {self.name!r}; there are {', '.join(TABLES)}")
        super().__post_init__()

    @property
    def code_bits(self) -> int:
        return (len(TABLES[self.name]) - 1).bit_length()

    def fit(self, weight: Tensor) -> Scales:
        bottom, top = self.ranges(weight)
        return Scales(self.stored_scale(torch.maximum(top, -bottom) / TABLES[self.name][-1]), None)

    def codes(self, weight: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        _, middles = _values(self.name, weight.dtype, weight.device)
        return (torch.searchsorted(middles, (weight / scale).contiguous()) - self._first).to(weight.dtype)

    def values(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        values, _ = _values(self.name, scale.dtype, scale.device)
        return round_to(values[codes.long() + self._first] * scale, self.dtype)

    @property
    def _first(self) -> int:
        """The distance of the smallest code from 0."""
        return 1 << (self.code_bits - 1)


@cache
def _values(name: str, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return a table's values, and the middles between them."""
    values = torch.tensor(TABLES[name], dtype=dtype, device=device)
    return values, (values[1:] + values[:-1]) / 2
