"""The surgeon's removal of groups of columns: what the columns that are left cannot make good."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hesse.errors import ConditioningError
from hesse.scores.readers import Reader

DAMPING = 0.01  # of the mean eigenvalue of a reader's inputs


def independent_costs(readers: Sequence[Reader]) -> Tensor:
    """½ tr(G W_P A_PP W_Pᵀ) for each group P of columns, in the loss's unit: nothing is made good.

    For a single column k that is ½ E[a_k²] w_kᵀ G w_k: an atomic expert's output is a_k w_k. Source: HEAPr (Li et al.,
    2025, arXiv:2509.22299); G is that of an expert's own tokens, and counts by their share of all.
    """
    total = torch.zeros(len(readers[0].columns), dtype=torch.float64)
    for reader in readers:
        felt = reader.output_factor @ reader.weight
        for group, columns in enumerate(reader.columns):
            moved = felt[:, columns].T @ reader.weight[:, columns]
            total[group] += float((moved * reader.input_factor[columns][:, columns]).sum()) / 2
    return total


def greedy_removal(readers: Sequence[Reader], number: int) -> tuple[list[int], list[float]]:
    """Groups in the order in which the surgeon takes them, always the cheapest next, and what each adds to the cost.

    The cost of a group P is Σ over readers of ½ tr(G W_P ([A⁻¹]_PP)⁻¹ W_Pᵀ), W and A⁻¹ as they are after all before it:
    the increase of ½ tr(G D A Dᵀ) with the best values of all columns that are left. Source: Kurtic et al., 2022 and
    2023 (oBERT, ZipLM), with the loss's own G.
    """
    # Whatever is done to W is done from the right, so that it does the same to V = CᵀW, G = CCᵀ: tr(G D A Dᵀ) is V's.
    values = [_root(reader.output_factor).T @ reader.weight for reader in readers]
    inverses = [_inverse(reader) for reader in readers]
    left, order, costs = list(range(len(readers[0].columns))), list[int](), list[float]()
    for _ in range(number):
        each = torch.zeros(len(left), dtype=torch.float64)
        for reader, value, inverse in zip(readers, values, inverses, strict=True):
            places = torch.stack([reader.columns[group] for group in left])  # (groups, columns)
            each += _costs(value, inverse, places).cpu() / 2
        best = int(each.argmin())
        costs.append(float(each[best]))
        order.append(left.pop(best))
        for place, reader in enumerate(readers):
            columns = reader.columns[order[-1]]
            rows = torch.linalg.solve(inverses[place][columns][:, columns], inverses[place][columns])
            values[place] = values[place] - values[place][:, columns] @ rows
            inverses[place] = inverses[place] - inverses[place][:, columns] @ rows
    return order, costs


def _costs(value: Tensor, inverse: Tensor, places: Tensor) -> Tensor:
    """tr(V_P ([A⁻¹]_PP)⁻¹ V_Pᵀ) for the columns P of each row of `places`."""
    if places.shape[1] == 1:
        return value[:, places[:, 0]].square().sum(0) / inverse.diagonal()[places[:, 0]]
    blocks = inverse[places[:, :, None], places[:, None, :]]
    parts = value[:, places].permute(1, 2, 0)  # (groups, columns, out)
    costs: Tensor = (parts * torch.linalg.solve(blocks, parts)).sum((1, 2))
    return costs


def refitted(reader: Reader, gone: Sequence[int]) -> Tensor:
    """The reader's matrix with the columns of some groups zero, and the others moved to the least ½ tr(G D A Dᵀ).

    That is W A_:K (A_KK)⁻¹ for the columns K that are left, whatever G is: the least squares on its inputs.
    """
    lost = set(torch.cat([reader.columns[group] for group in gone]).tolist())
    kept = [column for column in range(reader.weight.shape[1]) if column not in lost]
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
            f"the inputs of {reader.parameter} have no moments to speak of: use more data, or leave the layer out"
        ) from None


def _root(factor: Tensor) -> Tensor:
    """C with CCᵀ = factor, for one that may be singular."""
    if factor.ndim == 1:
        return factor.clamp(min=0).sqrt().diag()
    values, vectors = torch.linalg.eigh(factor)
    root: Tensor = vectors * values.clamp(min=0).sqrt()
    return root
