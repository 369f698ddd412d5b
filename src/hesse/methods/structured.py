"""Methods that take whole heads, neurons, channels or experts out."""

from hesse.methods.row import Row

GROUPS = ("groups",)  # a partition: parts that are sliced away
CALL = 'hesse.prune_groups(model, batches, method="{}")'
NEEDS = "a traceable network and calibration data"


def _row(
    name: str, curvature: str, solver: str, source: str, needs: str = NEEDS, optional: tuple[str, ...] = ()
) -> Row:
    method = name.removesuffix("-groups")
    return Row(name, curvature, GROUPS, solver, source, needs, CALL.format(method), optional)


ROWS = (
    _row("random-groups", "none", "nearest", "the floor"),
    _row(
        "magnitude-groups", "identity", "nearest", "Li et al., 2017, arXiv:1608.08710, over all that goes with a group"
    ),
    _row("taylor-groups", "g gᵀ of batches", "nearest", "Molchanov et al., 2019, arXiv:1906.10771"),
    _row("fisher-groups", "fisher of samples", "nearest", "½ wᵀFw of each group's outgoing weights"),
    _row(
        "hap-groups",
        "hessian, trace of each group",
        "nearest",
        "HAP, Yu et al., 2022, arXiv:2101.08940",
        "a traceable network, calibration data, second derivatives",
        ("low_rank",),
    ),
    _row("heapr-groups", "kronecker", "nearest", "HEAPr, Li et al., 2025, arXiv:2509.22299; of any neuron or head"),
    _row(
        "obs-groups",
        "kronecker",
        "greedy_surgeon",
        "Kurtic et al., 2023, arXiv:2302.04089 (ZipLM), with the loss's own G",
    ),
    Row(
        name="pagcp-groups",
        curvature="the measured loss",
        constraint=GROUPS,
        solver="greedy, site by site",
        source="PAGCP, Ye et al., 2023, arXiv:2303.11923, one task",
        needs="a traceable network, data and a tolerance",
        run='hesse.prune_groups(model, batches, method="pagcp", tolerance=0.05)',
    ),
    Row(
        name="axformer",
        curvature="the measured loss",
        constraint=GROUPS,
        solver="greedy, from sub-layers down to heads and neurons",
        source="AxFormer, Nagarajan et al., 2020, arXiv:2010.03688, without hard attention",
        needs="a traceable network, data and a tolerance",
        run='hesse.prune_groups(model, batches, method="axformer", tolerance=0.05)',
    ),
    Row(
        name="only-train-once",
        curvature="identity, λ Σ ‖w_g‖",
        constraint=GROUPS,
        solver="half-space projected gradient",
        source="Chen et al., 2021, arXiv:2107.07467",
        needs="a traceable network and training data",
        run="hesse.only_train_once(model, batches, steps=1000)",
    ),
)
