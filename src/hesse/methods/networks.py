"""Pruning that ranks all weights of a network together, by a score."""

from hesse.methods.method import Method
from hesse.methods.table import register


def _row(score: str, curvature: str | None, source: str, needs: str) -> Method:
    return Method(
        name=score,
        curvature=curvature,
        constraints=("sparse",),
        score=score,
        solver="weight_ranking",
        source=source,
        needs=needs,
        verb="prune",
    )


register(
    _row("random", None, "the floor of every comparison", "no data, except to predict the cost"),
    _row("gradient", None, "|w g|, Molchanov et al., 2019, arXiv:1906.10771", "data with targets"),
    _row(
        "oba",
        "hessian",
        "|w (Hw)|, Optimal Brain Apoptosis, Sun et al., 2025, arXiv:2502.17941",
        "data with targets; two backward passes",
    ),
    _row(
        "m-fac-network",
        "fisher_gradients",
        "Frantar, Kurtic and Alistarh, 2021, arXiv:2107.03356, over all layers at once",
        "data; a gradient of the whole network for each sample in memory, three times",
    ),
    _row(
        "mad",
        "kronecker",
        "Masking Adversarial Damage, Lee et al., 2022, arXiv:2204.02738, for whole removals",
        "data with targets, and an attack",
    ),
    family="networks",
)
