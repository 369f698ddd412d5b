"""Pruning that judges all weights of a network together."""

from hesse.methods.method import Method
from hesse.methods.table import register


def _row(name: str, curvature: str | None, solver: str, source: str, needs: str) -> Method:
    return Method(
        name=name,
        curvature=curvature,
        constraints=("sparse",),
        partition="the network",
        score=name,
        solver=solver,
        source=source,
        needs=needs,
        verb="prune_module",
    )


register(
    _row("random", None, "nearest", "the floor of every comparison", "no data, except to predict the cost"),
    _row("gradient", None, "nearest", "|w g|, Molchanov et al., 2019, arXiv:1906.10771", "data with targets"),
    _row(
        "oba",
        "hessian",
        "nearest",
        "|w (Hw)|, Optimal Brain Apoptosis, Sun et al., 2025, arXiv:2502.17941",
        "data with targets; two backward passes",
    ),
    _row(
        "m-fac-network",
        "fisher_gradients",
        "surgeon_in_steps",
        "Frantar, Kurtic and Alistarh, 2021, arXiv:2107.03356, over all layers at once",
        "data; a gradient of the whole network for each sample in memory, three times",
    ),
    _row(
        "mad",
        "kronecker",
        "nearest",
        "Masking Adversarial Damage, Lee et al., 2022, arXiv:2204.02738, for whole removals",
        "data with targets, and an attack",
    ),
    family="networks",
)
