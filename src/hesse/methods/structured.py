"""Methods that remove whole heads, neurons, channels or experts."""

from hesse.methods.method import Method
from hesse.methods.options import Option
from hesse.methods.table import register

NEEDS = "a traceable network and calibration data"
TOLERANCE = (Option("tolerance", "float", None, "Stop when the loss has risen by this much (nats per sample)."),)


def _row(
    name: str,
    curvature: str | None,
    score: str,
    source: str,
    solver: str = "nearest",
    needs: str = NEEDS,
    settings: tuple[Option, ...] = (),
    verb: str = "prune_groups",
) -> Method:
    return Method(
        name=name,
        curvature=curvature,
        constraints=("sparse",),
        partition="groups",
        score=score,
        solver=solver,
        source=source,
        needs=needs,
        settings=settings,
        verb=verb,
    )


register(
    _row("random-groups", None, "random", "the floor"),
    _row(
        "magnitude-groups",
        "identity",
        "magnitude",
        "Li et al., 2017, arXiv:1608.08710, over all that goes with a group",
    ),
    _row("taylor-groups", "g gᵀ of batches", "taylor", "Molchanov et al., 2019, arXiv:1906.10771"),
    _row("fisher-groups", "fisher of samples", "fisher", "½ wᵀFw of each group's outgoing weights"),
    _row(
        "hap-groups",
        "hessian",
        "hap",
        "HAP, Yu et al., 2022, arXiv:2101.08940",
        needs="a traceable network, calibration data, second derivatives",
    ),
    _row("heapr-groups", "kronecker", "heapr", "HEAPr, Li et al., 2025, arXiv:2509.22299; of any neuron or head"),
    _row(
        "obs-groups",
        "kronecker",
        "obs",
        "Kurtic et al., 2023, arXiv:2302.04089 (ZipLM), with the loss's own G",
        solver="greedy_surgeon",
    ),
    _row(
        "pagcp-groups",
        None,
        "pagcp",
        "PAGCP, Ye et al., 2023, arXiv:2303.11923, one task",
        solver="greedy, site by site",
        needs="a traceable network, data and a tolerance",
        settings=TOLERANCE,
    ),
    _row(
        "axformer",
        None,
        "axformer",
        "AxFormer, Nagarajan et al., 2020, arXiv:2010.03688, without hard attention",
        solver="greedy, from sub-layers down to heads and neurons",
        needs="a traceable network, data and a tolerance",
        settings=TOLERANCE,
    ),
    _row(
        "only-train-once",
        "identity",
        "group norms",
        "Chen et al., 2021, arXiv:2107.07467",
        solver="half-space projected gradient",
        needs="a traceable network and training data",
        verb="only_train_once",
    ),
    family="structured",
)
