"""Origin of a curvature: which matrix it estimates, per what and in which unit, so that none are mixed."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from hesse.errors import OptionError

Per = Literal["position", "sample", "term"]


@dataclass(frozen=True)
class Origin:
    """The matrix that a curvature estimates.

    `matrix` is "sampled Fisher", "empirical Fisher", "exact Fisher", "Gauss-Newton", "Hessian" or "layer output".
    `per` is the reduction: the squared gradient is that of a "sample" (a sequence), of a "term" of the loss (a token),
    or of each "position" of a sample, as if positions were independent. `unit` is that of ½ dᵀHd, such as
    "mean loss" or "nats per token".
    """

    matrix: str
    per: Per
    unit: str

    def __str__(self) -> str:
        return f"{self.matrix} per {self.per} in {self.unit}"


def common_origin(origins: Iterable[Origin | None], where: str) -> Origin | None:
    """Return the one origin of curvatures that `where` joins; an unstated origin (None) matches any.

    Raises:
        OptionError: two differ; the scale of their entries then differs by up to the length of a sequence.
    """
    known = list(dict.fromkeys(origin for origin in origins if origin is not None))
    if len(known) > 1:
        raise OptionError(f"{where} mixes a {known[0]} with a {known[1]}: estimate them alike")
    return known[0] if known else None
