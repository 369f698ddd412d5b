"""S = matrices whose rows each take few values: non-uniform quantisation with a table a row."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hesse.constraints.base import Constraint, metric_or_ones, round_to
from hesse.constraints.one_dimensional_means import best_means
from hesse.errors import OptionError


@dataclass(frozen=True, eq=False)
class CodebookCode:
    """weight[i, j] = values[i, codes[i, j]]."""

    codes: Tensor  # (out, in) uint8
    values: Tensor  # (out, 2^bits), ascending, of the codebook's dtype held in float32


@dataclass(frozen=True, eq=True)
class Codebook(Constraint):
    """2^`bits` values for each row: those of least Σ metric · difference², the exact optimum of k-means on a line.

    Source: SqueezeLLM (Kim et al., 2023), whose k-means is a local search.
    """

    bits: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise OptionError(f"bits is {self.bits}, but a Codebook has 1 to 8")

    bytes_per_weight = 36  # nine matrices of its size, some in float64
    rows_are_independent = True

    def check(self, shape: torch.Size) -> None:
        if 1 << self.bits >= shape[1]:
            raise OptionError(
                f"a codebook of {1 << self.bits} values is as large as a row of {shape[1]} weights, or larger: use "
                "fewer bits, or ignore the layer"
            )

    def encode(self, weight: Tensor, metric: Tensor | None = None) -> CodebookCode:
        ordered, order = weight.detach().double().cpu().sort(1)
        masses = metric_or_ones(weight, metric).detach().double().cpu().gather(1, order)
        means = torch.empty(len(weight), 1 << self.bits, dtype=torch.float64)
        best_means(ordered.numpy(), masses.numpy(), means.numpy())
        return self.round(weight, round_to(means.sort(1).values.to(weight), self.dtype))

    def round(self, weight: Tensor, values: Tensor) -> CodebookCode:
        """Return the codes of `weight` (out, any): the nearest of the ascending `values` (out, k) of its row."""
        held = values.to(weight)
        codes = torch.searchsorted(((held[:, 1:] + held[:, :-1]) / 2).contiguous(), weight.contiguous())
        return CodebookCode(codes.to(torch.uint8), values)

    def decode(self, encoded: CodebookCode) -> Tensor:
        return encoded.values.gather(1, encoded.codes.long())

    def bits_per_weight(self, shape: torch.Size) -> float:
        return self.bits + torch.finfo(self.dtype).bits * (1 << self.bits) / shape[1]
