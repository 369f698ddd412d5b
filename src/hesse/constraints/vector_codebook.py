"""S = matrices cut into short columns, each a sum of entries of codebooks: vector quantisation."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hesse.constraints.base import Constraint, metric_or_ones, round_to
from hesse.constraints.weighted_means import AT_ONCE, nearest_vectors, weighted_means
from hesse.errors import OptionError

STEPS = 30  # of k-means
MOST_BITS = 16  # of an index


@dataclass(frozen=True, eq=False)
class VectorCode:
    """weight[v i : v i + v, j] = Σ over books of centroids[book, codes[book, i, j]], for vectors of v weights."""

    codes: Tensor  # (books, out / v, in) int32
    centroids: Tensor  # (books, 2^k, v), of the codebook's dtype held in float32


@dataclass(frozen=True, eq=True)
class VectorCodebook(Constraint):
    """`length` neighboring outputs of one input are an entry of a codebook, or with several `books` a sum of entries.

    An index takes k = bits · length / books bits, so that indices take `bits` per weight; each layer has its own
    codebooks of 2^k entries. The first is k-means of the vectors, each later one k-means of the residuals.
    Source: VPTQ (Liu et al., 2024), whose residual codebook is a second book.
    """

    bits: int = 2
    length: int = 4
    books: int = 1

    def __post_init__(self) -> None:
        if self.bits < 1 or self.length < 1 or self.books < 1:
            raise OptionError(
                f"a VectorCodebook of {self.bits} bits, vectors of {self.length} and {self.books} books: all are 1 at "
                "least"
            )
        whole, rest = divmod(self.bits * self.length, self.books)
        if rest or whole > MOST_BITS:
            raise OptionError(
                f"{self.bits} bits times vectors of {self.length}, over {self.books} books, give an index of "
                f"{self.bits * self.length / self.books:g} bits, but it has a whole number up to {MOST_BITS}: use "
                "shorter vectors, or more books"
            )

    @property
    def entries(self) -> int:
        """The number of vectors in a codebook."""
        return 1 << (self.bits * self.length // self.books)

    @property
    def together(self) -> int:
        return self.length

    def workspace(self, shape: torch.Size) -> int:
        distances = min(shape.numel() // self.length * self.entries, AT_ONCE + self.entries)
        return 4 * (6 * shape.numel() + 2 * distances)

    def check(self, shape: torch.Size) -> None:
        if shape[0] % self.length:
            raise OptionError(
                f"vectors of {self.length} need a height divisible by {self.length}, and this one is {shape[0]}: use "
                "another length, or leave the layer out with --ignore"
            )
        if self.entries * self.length >= shape.numel():
            raise OptionError(
                f"a codebook of {self.entries} vectors of {self.length} is as large as a layer of {shape[0]} x "
                f"{shape[1]} weights: use fewer bits or shorter vectors, or leave the layer out with --ignore"
            )

    def encode(self, weight: Tensor, metric: Tensor | None = None) -> VectorCode:
        masses = self.vectors(metric_or_ones(weight, metric))
        left, books, codes = self.vectors(weight), [], []
        for book in range(self.books):
            books.append(round_to(weighted_means(left, masses, self.entries, STEPS, seed=book), self.dtype))
            codes.append(nearest_vectors(left, books[-1].to(left), masses))
            left = left - books[-1].to(left)[codes[-1]]
        return self.code(torch.stack(codes), torch.stack(books), weight.shape)

    def choose(self, vectors: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
        """Return indices (books, n) of entries whose sums approximate `vectors` (n, v), book by book, and the sums."""
        left, codes = vectors, []
        for book in centroids.to(vectors):
            codes.append(nearest_vectors(left, book))
            left = left - book[codes[-1]]
        return torch.stack(codes), vectors - left

    def vectors(self, weight: Tensor) -> Tensor:
        """Return the vectors (n, v) of a weight (out, in), input by input."""
        return weight.T.reshape(-1, self.length)

    def code(self, codes: Tensor, centroids: Tensor, shape: torch.Size) -> VectorCode:
        """Return the stored form of indices (books, n) of the vectors of a weight of `shape`."""
        placed = codes.view(len(codes), shape[1], -1).transpose(1, 2)
        return VectorCode(placed.to(torch.int32).contiguous(), centroids)

    def decode(self, encoded: VectorCode) -> Tensor:
        parts = [book[codes.long()] for book, codes in zip(encoded.centroids, encoded.codes, strict=True)]
        total = torch.stack(parts).sum(0)  # (out / v, in, v)
        return round_to(total.transpose(1, 2).reshape(-1, total.shape[1]), self.dtype)

    def bits_per_weight(self, shape: torch.Size) -> float:
        held = self.books * self.entries * self.length * torch.finfo(self.dtype).bits
        return self.bits + held / shape.numel()
