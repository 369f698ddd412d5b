"""Rows of the table that prune a network in memory: from the table of scores, and methods that measure or train."""

from hesse.methods import Method, register
from hesse.modules.prune import STRATEGIES
from hesse.options import settings_of
from hesse.scores import find_score

TRACED = "a traceable network and calibration data"


def by_score(name: str, score: str, partition: str, solver: str, needs: str) -> Method:
    """Return the row that removes the parts of the lowest score, with the score's own curvature and source."""
    found = find_score(score)
    return Method(
        name=name,
        curvature=found.uses,
        constraints=("sparse",),
        partition=partition,
        score=score,
        solver=solver,
        source=found.source,
        needs=needs,
        settings=settings_of(STRATEGIES[solver]),  # type: ignore[arg-type]
        verb="prune",
    )


def of_strategy(
    name: str, solver: str, source: str, needs: str, partition: str = "groups", constraint: str = "sparse"
) -> Method:
    """Return the row of a strategy that has no score."""
    return Method(
        name=name,
        curvature=None,
        constraints=(constraint,),
        partition=partition,
        solver=solver,
        source=source,
        needs=needs,
        settings=settings_of(STRATEGIES[solver]),  # type: ignore[arg-type]
        verb="prune",
    )


WEIGHTS = {
    "random": "no data, except to predict the cost",
    "gradient": "data with targets",
    "oba": "data with targets; two backward passes",
    "m-fac-network": "data; a gradient of the whole network for each sample in memory, three times",
    "mad": "data with targets, and an attack",
}
GROUPS = {
    "random": TRACED,
    "magnitude": TRACED,
    "taylor": TRACED,
    "fisher": TRACED,
    "hap": "a traceable network, calibration data, second derivatives",
    "heapr": TRACED,
    "obs": TRACED,
}
register(
    *(by_score(name, name, "weights", "weight_ranking", needs) for name, needs in WEIGHTS.items()), family="networks"
)
register(
    *(by_score(f"{name}-groups", name, "groups", "group_ranking", needs) for name, needs in GROUPS.items()),
    of_strategy(
        "pagcp-groups",
        "site_tolerance",
        "PAGCP, Ye et al., 2023, arXiv:2303.11923, one task",
        "a traceable network, data and a tolerance",
    ),
    of_strategy(
        "axformer",
        "hierarchy",
        "AxFormer, Nagarajan et al., 2020, arXiv:2010.03688, without hard attention",
        "a traceable network, data and a tolerance",
    ),
    of_strategy(
        "only-train-once",
        "only_train_once",
        "Chen et al., 2021, arXiv:2107.07467",
        "a traceable network and training data",
    ),
    family="structured",
)
register(
    of_strategy(
        "modegpt-heads",
        "head_dimensions",
        "Lin et al., 2024, arXiv:2408.09632, its attention part, with an SVD in place of CR",
        "a network of torch's own attention, data",
        partition="head-dimensions",
        constraint="low_rank",
    ),
    family="blocks",
)
