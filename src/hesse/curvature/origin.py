"""What a curvature was estimated as, so that two of different meaning are not taken for one."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from hesse.errors import OptionError

Per = Literal["position", "sample", "term"]


@dataclass(frozen=True)
class Origin:
    """Which matrix a curvature stands for.

    `matrix` is "sampled Fisher", "empirical Fisher", "exact Fisher", "Gauss-Newton", "Hessian" or "layer output".
    `per` is the reduction: what is squared is the gradient of a "sample" (a sequence), of a "term" of the loss (a
    token), or of each "position" of a sample, taken as if they were independent. `unit` is that of ½ dᵀHd, such as
    "mean loss" or "nats per token".
    """

    matrix: str
    per: Per
    unit: str

    def __str__(self) -> str:
        return f"{self.matrix} per {self.per} in {self.unit}"


def common_origin(origins: Iterable[Origin | None], where: str) -> Origin | None:
    """The one origin of curvatures that `where` joins; those that nobody stated (None) go with any.

    Raises:
        OptionError: two differ, and with them the scale of their entries, by up to the length of a sequence.
    """
    known = list(dict.fromkeys(origin for origin in origins if origin is not None))
    if len(known) > 1:
        raise OptionError(f"{where} mixes a {known[0]} with a {known[1]}: estimate them alike")
    return known[0] if known else None
