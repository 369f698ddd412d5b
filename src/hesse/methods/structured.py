"""Methods that remove whole heads, hidden units, channels or experts from a network in memory."""

from hesse.methods.method import Method
from hesse.methods.table import register

NEEDS = "a traceable network and calibration data"


def _row(
    name: str,
    solver: str,
    source: str,
    curvature: str | None = None,
    needs: str = NEEDS,
    partition: str = "groups",
    constraint: str = "sparse",
) -> Method:
    """Return a row; a ranking's score has its name."""
    return Method(
        name=name,
        curvature=curvature,
        constraints=(constraint,),
        partition=partition,
        score=name.removesuffix("-groups") if solver == "group_ranking" else None,
        solver=solver,
        source=source,
        needs=needs,
        verb="prune",
    )


register(
    _row("random-groups", "group_ranking", "the floor"),
    _row(
        "magnitude-groups",
        "group_ranking",
        "Li et al., 2017, arXiv:1608.08710, over all that goes with a group",
        "identity",
    ),
    _row("taylor-groups", "group_ranking", "Molchanov et al., 2019, arXiv:1906.10771"),
    _row("fisher-groups", "group_ranking", "½ wᵀFw of each group's outgoing weights", "fisher_gradients"),
    _row(
        "hap-groups",
        "group_ranking",
        "HAP, Yu et al., 2022, arXiv:2101.08940",
        "hessian",
        "a traceable network, calibration data, second derivatives",
    ),
    _row(
        "heapr-groups",
        "group_ranking",
        "HEAPr, Li et al., 2025, arXiv:2509.22299; of any hidden unit or head",
        "kronecker",
    ),
    _row(
        "obs-groups",
        "group_ranking",
        "Kurtic et al., 2023, arXiv:2302.04089 (ZipLM), with the loss's own G",
        "kronecker",
    ),
    _row(
        "pagcp-groups",
        "site_tolerance",
        "PAGCP, Ye et al., 2023, arXiv:2303.11923, one task",
        needs="a traceable network, data and a tolerance",
    ),
    _row(
        "axformer",
        "hierarchy",
        "AxFormer, Nagarajan et al., 2020, arXiv:2010.03688, without hard attention",
        needs="a traceable network, data and a tolerance",
    ),
    _row(
        "only-train-once",
        "only_train_once",
        "Chen et al., 2021, arXiv:2107.07467",
        needs="a traceable network and training data",
    ),
    family="structured",
)
register(
    _row(
        "modegpt-heads",
        "head_dimensions",
        "Lin et al., 2024, arXiv:2408.09632, its attention part, with an SVD in place of CR",
        "gram",
        "a network of torch's own attention, data",
        "head-dimensions",
        "low_rank",
    ),
    family="blocks",
)
