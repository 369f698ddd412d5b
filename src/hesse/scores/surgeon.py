"""Scores of groups by what reads them, and the surgeon's greedy removal with the best values of all other columns."""

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from hesse.errors import ConditioningError
from hesse.partitions import GroupParts
from hesse.scores.evidence import LossEvidence
from hesse.scores.readers import Reader
from hesse.scores.score import READ_GROUPS, Orders, Score, add_score, register_score

DAMPING = 0.01  # of the mean eigenvalue of a reader's inputs


@register_score(
    "heapr",
    source="HEAPr, Li et al., 2025, arXiv:2509.22299; of any hidden unit or head",
    parts=READ_GROUPS,
    uses="kronecker",
    nats=True,
)
def independent_removal(evidence: LossEvidence, partition: GroupParts) -> Tensor:
    """½ tr(G W_P A_PP W_Pᵀ) for the columns P of a group in the layers that read it: nothing else is refitted."""
    return _costs_by_site(evidence, partition, independent_costs)


def _costs_by_site(
    evidence: LossEvidence, partition: GroupParts, costs: Callable[[Sequence[Reader]], Tensor]
) -> Tensor:
    """Return the costs of all groups (parts,), which the readers of each site give."""
    total = torch.zeros(partition.count, dtype=torch.float64)
    for site, readers in evidence.readers(partition).items():
        total[partition.sites[site]] = costs(readers)
    return total


class Surgeon(Score):
    """½ tr(G W_P ([A⁻¹]_PP)⁻¹ W_Pᵀ): the cost with the best values of all columns that are left.

    In an order of removal each cost counts all groups before it.
    """

    def cost(self, evidence: LossEvidence, partition: GroupParts) -> Tensor:
        return _costs_by_site(evidence, partition, removal_costs)

    def orders(self, evidence: LossEvidence, partition: GroupParts, numbers: Mapping[str, int]) -> Orders:
        self.check(partition.kind)
        result = Orders()
        for site, readers in evidence.readers(partition).items():
            order, costs = greedy_removal(readers, numbers[site])
            rest = sorted(set(range(len(partition.sites[site]))) - set(order))
            result[site] = order + rest, costs
        return result


add_score(
    Surgeon(
        name="obs",
        source="Kurtic et al., 2023, arXiv:2302.04089 (ZipLM), with the loss's own G",
        parts=READ_GROUPS,
        uses="kronecker",
        nats=True,
    )
)


def independent_costs(readers: Sequence[Reader]) -> Tensor:
    """Return ½ tr(G W_P A_PP W_Pᵀ) for each group P of columns, in the loss's unit; nothing is refitted.

    For a single column k that is ½ E[a_k²] w_kᵀ G w_k: an atomic expert's output is a_k w_k. Source: HEAPr (Li et al.,
    2025, arXiv:2509.22299); G is that of an expert's own tokens, and counts by their share of all.
    """
    total = torch.zeros(len(readers[0].columns), dtype=torch.float64)
    for reader in readers:
        weighted = reader.output_factor @ reader.weight
        for group, columns in enumerate(reader.columns):
            moved = weighted[:, columns].T @ reader.weight[:, columns]
            total[group] += float((moved * reader.input_factor[columns][:, columns]).sum()) / 2
    return total


def greedy_removal(readers: Sequence[Reader], number: int) -> tuple[list[int], list[float]]:
    """Return groups in the order in which the surgeon removes them, the cheapest next, and what each adds to the cost.

    The cost of a group P is Σ over readers of ½ tr(G W_P ([A⁻¹]_PP)⁻¹ W_Pᵀ), W and A⁻¹ as they are after all before it:
    the increase of ½ tr(G D A Dᵀ) with the best values of all columns that are left. Source: Kurtic et al., 2022 and
    2023 (oBERT, ZipLM), with the loss's own G.
    """
    values, inverses = _whitened(readers)
    left, order, costs = list(range(len(readers[0].columns))), list[int](), list[float]()
    for _ in range(number):
        each = _all_costs(readers, values, inverses, left)
        best = int(each.argmin())
        costs.append(float(each[best]))
        order.append(left.pop(best))
        for place, reader in enumerate(readers):
            columns = reader.columns[order[-1]]
            rows = torch.linalg.solve(inverses[place][columns][:, columns], inverses[place][columns])
            values[place] = values[place] - values[place][:, columns] @ rows
            inverses[place] = inverses[place] - inverses[place][:, columns] @ rows
    return order, costs


def removal_costs(readers: Sequence[Reader]) -> Tensor:
    """Return what `greedy_removal` counts for each group before any is removed (groups,)."""
    return _all_costs(readers, *_whitened(readers), range(len(readers[0].columns)))


def _whitened(readers: Sequence[Reader]) -> tuple[list[Tensor], list[Tensor]]:
    """CᵀW and A⁻¹ of each reader, G = CCᵀ: W is changed from the right alone, so that tr(G D A Dᵀ) is CᵀW's own."""
    values = [root(reader.output_factor).T @ reader.weight for reader in readers]
    return values, [_inverse(reader) for reader in readers]


def _all_costs(
    readers: Sequence[Reader], values: Sequence[Tensor], inverses: Sequence[Tensor], groups: Sequence[int]
) -> Tensor:
    """The cost of each of some groups, summed over readers (groups,)."""
    total = torch.zeros(len(groups), dtype=torch.float64)
    for reader, value, inverse in zip(readers, values, inverses, strict=True):
        places = torch.stack([reader.columns[group] for group in groups])  # (groups, columns)
        total += _costs(value, inverse, places).cpu() / 2
    return total


def _costs(value: Tensor, inverse: Tensor, places: Tensor) -> Tensor:
    """tr(V_P ([A⁻¹]_PP)⁻¹ V_Pᵀ) for the columns P of each row of `places`."""
    if places.shape[1] == 1:
        return value[:, places[:, 0]].square().sum(0) / inverse.diagonal()[places[:, 0]]
    blocks = inverse[places[:, :, None], places[:, None, :]]
    parts = value[:, places].permute(1, 2, 0)  # (groups, columns, out)
    return cast(Tensor, (parts * torch.linalg.solve(blocks, parts)).sum((1, 2)))


def fitted_weight(reader: Reader, removed: Sequence[int]) -> Tensor:
    """Return the reader's matrix with the columns of `removed` groups zero and the others at the least ½ tr(G D A Dᵀ).

    That is W A_:K (A_KK)⁻¹ for the columns K that are left, whatever G is: the least squares on its inputs.
    """
    lost = torch.cat([reader.columns[group] for group in removed]).tolist()
    kept = sorted(set(range(reader.weight.shape[1])) - set(lost))
    gram = _damped(reader.input_factor)
    result = torch.zeros_like(reader.weight)
    result[:, kept] = torch.linalg.solve(gram[kept][:, kept], gram[kept] @ reader.weight.T).T
    return result


def _damped(gram: Tensor) -> Tensor:
    return gram + DAMPING * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)


def _inverse(reader: Reader) -> Tensor:
    try:
        return torch.cholesky_inverse(torch.linalg.cholesky(_damped(reader.input_factor)))
    except RuntimeError:
        raise ConditioningError(
            f"the second moments of the inputs of {reader.parameter} are zero or singular: use more data, or leave the "
            "layer out"
        ) from None


def root(factor: Tensor) -> Tensor:
    """Return C with C Cᵀ = `factor` (n, n), which may be singular; of a diagonal (n,) too."""
    if factor.ndim == 1:
        return factor.clamp(min=0).sqrt().diag()
    values, vectors = torch.linalg.eigh(factor)
    return cast(Tensor, vectors * values.clamp(min=0).sqrt())
