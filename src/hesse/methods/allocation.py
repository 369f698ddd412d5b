"""Ways to share one budget out among layers; what is then done to a layer is the business of other rows."""

from hesse.methods.row import Row

_PLAIN = "hesse.planning.price(OBJECTIVE, MENU, {name!r}).cheapest(SIZE)"

ROWS = (
    Row(
        name="hawq",
        curvature="largest eigenvalue",
        constraint=("grid",),
        solver="knapsack",
        source="Dong et al., 2019, arXiv:1905.03696",
        needs="calibration text and a budget",
        run="hesse compress MODEL OUT --size 40% --allocation hawq",
        optional=("sparse", "low_rank"),
    ),
    Row(
        name="hawq-v2",
        curvature="trace",
        constraint=("grid",),
        solver="knapsack",
        source="Dong et al., 2019, arXiv:1911.03852",
        needs="calibration text and a budget",
        run="hesse compress MODEL OUT --size 40% --allocation hawq-v2",
        optional=("sparse", "low_rank"),
    ),
    Row(
        name="q-bert",
        curvature="largest eigenvalues of parts of the data",
        constraint=("grid",),
        solver="knapsack",
        source="Shen et al., 2019, arXiv:1909.05840",
        needs="a module in memory, data and a budget",
        run=_PLAIN.format(name="q-bert"),
    ),
    Row(
        name="inter-layer",
        curvature="gauss_newton over all layers",
        constraint=("grid",),
        solver="bisection",
        source="Schaefer et al., 2023, arXiv:2306.04879",
        needs="a module in memory, data, and a measure with a floor",
        run="hesse.planning.smallest_accepted(PRICING.problem, ACCEPTS)",
    ),
    Row(
        name="q-vlm",
        curvature="gauss_newton over blocks of layers",
        constraint=("grid",),
        solver="knapsack",
        source="Wang et al., 2024, arXiv:2410.08119, blocks by the Hessian in place of an entropy",
        needs="a module in memory, data and a budget",
        run=_PLAIN.format(name="q-vlm"),
    ),
    Row(
        name="lpvit",
        curvature="fisher of samples, or squared gradient",
        constraint=("sparse",),
        solver="common_slope",
        source="Xu et al., 2024, arXiv:2407.02068",
        needs="a module in memory, data, and a share to keep",
        run="hesse.planning.plan_tiles(OBJECTIVE, KEPT)",
    ),
)
