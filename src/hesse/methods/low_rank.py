"""Methods that factorise weights into two thin ones."""

from hesse.methods.method import Method, Options

METHODS = (
    Method(
        name="svd",
        curvature="identity",
        constraints=("low_rank",),
        solver="nearest",
        source="Eckart and Young, 1936",
        needs="no data, except to predict the cost",
        defaults=Options(rank=64),
    ),
    Method(
        name="activation-svd",
        curvature="gram",
        constraints=("low_rank",),
        solver="whitened_svd",
        source="Wang et al., 2024, arXiv:2403.07378",
        needs="calibration text",
        defaults=Options(rank=64, damping=0.01),
    ),
)
