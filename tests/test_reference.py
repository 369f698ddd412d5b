"""The reference loops are optimal brain surgery: H⁻¹ written out, weights leaving it by Gaussian elimination."""

from itertools import product

import pytest
import torch
from torch import Tensor

from hesse.solvers._reference import gptq, two_sided
from hesse.testing import normal


def moment(seed: int, width: int) -> Tensor:
    rows = normal(seed, 3 * width, width) * normal(seed + 1, width).exp() + normal(seed + 2, 3 * width, 1)
    return rows.T @ rows / len(rows)


def surgery(weight: Tensor, hessian: Tensor, order: list[int]) -> Tensor:
    """Round each of the weights (n,) in turn: the others move by -e / [H⁻¹]_pp H⁻¹_p, and p leaves H⁻¹."""
    work, inverse = weight.clone(), torch.linalg.inv(hessian)
    for p in order:
        error = work[p] - work[p].round()
        work -= error / inverse[p, p] * inverse[p]
        inverse = inverse - torch.outer(inverse[p], inverse[p]) / inverse[p, p]
        inverse[p] = inverse[:, p] = 0
    return work.round()


@pytest.mark.parametrize("seed", range(4))
def test_gptq_is_surgery_on_each_row(seed: int) -> None:
    weight, hessian = 3 * normal(seed, 5, 12), moment(seed + 10, 12)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed)).tolist()
    found = gptq(weight, hessian, order, lambda work, column: work[:, column].round())
    assert torch.equal(found, torch.stack([surgery(row, hessian, order) for row in weight]))


@pytest.mark.parametrize("shape", [(5, 8), (8, 6), (1, 7), (6, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_the_two_sided_update_is_surgery_on_the_whole_matrix(shape: tuple[int, int], seed: int) -> None:
    weight, outputs, inputs = 3 * normal(seed, *shape), moment(seed + 10, shape[0]), moment(seed + 20, shape[1])
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.randperm(size, generator=generator).tolist() for size in shape)
    order = [row * shape[1] + column for column, row in product(columns, rows)]
    found = two_sided(weight, outputs, inputs, rows, columns, lambda value, row, column: value.round())
    assert torch.equal(found, surgery(weight.flatten(), torch.kron(outputs, inputs), order).view(shape))
