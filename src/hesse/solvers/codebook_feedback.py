"""Error feedback over columns, each weight taken to the nearest value of its row's codebook."""

import torch
from torch import Tensor

from hesse.constraints import Codebook, CodebookCode
from hesse.constraints.base import round_to
from hesse.curvature import Gram
from hesse.solvers.never_worse import rows_cheaper_plain
from hesse.solvers.refit import in_order, refit_values
from hesse.solvers.sweeps.columns import sweep_columns


def feed_back_codebook(
    codebook: Codebook, weight: Tensor, gram: Gram, order: Tensor, feedback: Tensor, block_size: int, refit_steps: int
) -> CodebookCode:
    """Codes of `weight` (out, in) by Optimal Brain Surgeon's update, columns `taken` in this order; values refitted.

    Values are those of k-means weighted by E[x²]; `feedback` is the update in the order `taken`. No row comes out worse
    than by k-means alone.
    """
    plain = codebook.encode(weight, gram.diagonal().to(weight.dtype).expand_as(weight))
    work = weight.T.contiguous()[order]
    codes = plain.codes.new_empty(work.shape)

    def allowed(j: int, column: Tensor) -> Tensor:
        code = codebook.round(column[:, None], plain.values)
        codes[j] = code.codes[:, 0]
        return codebook.decode(code)[:, 0]

    sweep_columns(work, feedback.to(work), block_size, allowed)
    swept = CodebookCode(codes[torch.argsort(order)].T.contiguous(), plain.values)
    slope = gram.matvec(codebook.decode(swept).to(weight.dtype) - weight)
    refitted = in_order(swept, round_to(refit_values(swept, slope, gram, refit_steps), codebook.dtype))
    best = plain
    for code in (swept, refitted):
        solved, other = (codebook.decode(each).to(weight.dtype) for each in (code, best))
        worse = rows_cheaper_plain(gram, weight, solved, other)
        best = CodebookCode(torch.where(worse, best.codes, code.codes), torch.where(worse, best.values, code.values))
    return best
