"""The curvatures that a rule can name: what each is made of, and how."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from hesse.curvature import BlockRankOneSum, Curvature, Diagonal, Gram, Identity, Kronecker, RankOneSum
from hesse.methods.solver_options import SolverOptions
from hesse.registry import Registry

Statistic = Literal[
    "inputs",
    "weighted inputs",
    "output factor",
    "attention factor",
    "fisher diagonal",
    "fisher blocks",
    "fisher gradients",
]
ON_WEIGHTS: frozenset[Statistic] = frozenset({"fisher diagonal", "fisher blocks", "fisher gradients"})


class Known(Protocol):
    """What is known of a layer when it is solved."""

    @property
    def weight(self) -> Tensor:
        """(out, in)."""

    @property
    def gram(self) -> Gram:
        """Of its inputs, E[xxᵀ]."""

    @property
    def weighted(self) -> Gram | None:
        """E[r xxᵀ] with the weights r of the inputs' positions; None where these are not known."""

    @property
    def outputs(self) -> Tensor | None:
        """What the loss feels of its outputs: E[ggᵀ] (out, out), or its diagonal (out,); None if nothing is known."""

    @property
    def attention(self) -> Tensor | None:
        """What the output of the attention feels of its outputs, (out, out); None for a layer outside attention."""

    @property
    def fisher(self) -> Tensor | None:
        """The true Fisher on its weight; None if nothing is known.

        The diagonal (out, in), per position, or per sample: blocks of neighbours in row-major order (blocks, size,
        size), or the gradients g (samples, out, in) of which it is the mean g gᵀ.
        """


@dataclass(frozen=True)
class CurvatureKind:
    """A curvature of one layer's weight.

    `build` makes it from the layer's statistics and a damping. Layers with the same statistics share what it returns,
    so it may look at the weight's shape, if `couples_rows`, and not at its values.
    """

    name: str
    needs: frozenset[Statistic]
    build: Callable[[Known, SolverOptions, float], Curvature]  # from what is known, with a damping
    couples_rows: bool = False


def unknown(statistic: Tensor | None) -> bool:
    """Whether the tokens that probed the loss did not reach a layer."""
    return statistic is None or not bool(statistic.any())


def _gram(known: Known, _: SolverOptions, damping: float) -> Curvature:
    return known.gram.damped(damping)


def _weighted_gram(known: Known, _: SolverOptions, damping: float) -> Curvature:
    return (known.gram if known.weighted is None else known.weighted).damped(damping)


def _gram_diagonal(known: Known, _: SolverOptions, damping: float) -> Curvature:
    return known.gram.damped(damping).diagonal_part()


def _kronecker(known: Known, options: SolverOptions, damping: float) -> Curvature:
    return _of_outputs(known.outputs, known, options, damping)


def _attention(known: Known, options: SolverOptions, damping: float) -> Curvature:
    return _of_outputs(known.attention, known, options, damping)


def _of_outputs(outputs: Tensor | None, known: Known, options: SolverOptions, damping: float) -> Curvature:
    if outputs is None or unknown(outputs):  # its outputs are taken as equals
        outputs = torch.ones_like(known.weight[:, 0])
    kronecker = Kronecker(output_factor=outputs, input_factor=known.gram.second_moment)
    return kronecker.with_damped_factors(options.output_damping, damping)


def _fisher_diagonal(known: Known, _: SolverOptions, damping: float) -> Curvature:
    values = torch.ones_like(known.weight) if known.fisher is None else known.fisher
    return Diagonal(values=values)


def _fisher_rows_columns(known: Known, _: SolverOptions, damping: float) -> Curvature:
    """F_ij ≈ (r_i c_j / m)² with the means r, c and m of √F over a row, a column and all: LQ-LoRA, Guo et al., 2023."""
    root = _felt(known).sqrt()
    rows, columns = root.mean(1), root.mean(0) / root.mean()
    return Kronecker(output_factor=rows**2, input_factor=columns**2).with_damped_factors(damping, damping)


def _fisher_columns(known: Known, _: SolverOptions, damping: float) -> Curvature:
    """F_ij ≈ its mean over the outputs i, one value an input: FWSVD, Hsu et al., 2022, whose layers are z = xW."""
    fisher = _felt(known)
    ones = torch.ones_like(fisher[:, 0])
    return Kronecker(output_factor=ones, input_factor=fisher.mean(0)).with_damped_factors(0, damping)


def _felt(known: Known) -> Tensor:
    """The Fisher's diagonal (out, in), or ones where nothing is known of it."""
    fisher = known.fisher
    return torch.ones_like(known.weight) if fisher is None or unknown(fisher) else fisher


def _fisher_blocks(known: Known, _: SolverOptions, damping: float) -> Curvature:
    blocks = known.fisher
    if blocks is None:
        blocks = torch.eye(32).to(known.weight).repeat(-(-known.weight.numel() // 32), 1, 1)
    return BlockRankOneSum(matrices=blocks, weight_shape=tuple(known.weight.shape)).damped(damping)


def _fisher_gradients(known: Known, _: SolverOptions, damping: float) -> Curvature:
    if known.fisher is None or unknown(known.fisher):
        return RankOneSum.from_gradients(torch.zeros_like(known.weight)[None]).with_damping(1)
    return RankOneSum.from_gradients(known.fisher).damped(damping, of="range")  # fewer gradients than weights


_KINDS = (
    CurvatureKind("identity", frozenset(), lambda known, options, damping: Identity()),
    CurvatureKind("gram_diagonal", frozenset({"inputs"}), _gram_diagonal),
    CurvatureKind("gram", frozenset({"inputs"}), _gram),
    CurvatureKind("weighted_gram", frozenset({"inputs", "weighted inputs"}), _weighted_gram),
    CurvatureKind("fisher_diagonal", frozenset({"fisher diagonal"}), _fisher_diagonal),
    CurvatureKind("fisher_rows_columns", frozenset({"fisher diagonal"}), _fisher_rows_columns),
    CurvatureKind("fisher_columns", frozenset({"fisher diagonal"}), _fisher_columns),
    CurvatureKind("fisher_blocks", frozenset({"fisher blocks"}), _fisher_blocks),
    CurvatureKind("fisher_gradients", frozenset({"fisher gradients"}), _fisher_gradients),
    CurvatureKind("kronecker", frozenset({"inputs", "output factor"}), _kronecker, couples_rows=True),
    CurvatureKind("attention", frozenset({"inputs", "attention factor"}), _attention, couples_rows=True),
)
CURVATURES: Registry[CurvatureKind] = Registry("curvature")
for _kind in _KINDS:
    CURVATURES.register(_kind.name, _kind)
