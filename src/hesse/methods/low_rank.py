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
    Method(
        name="kronecker-svd",
        curvature="kronecker",
        constraints=("low_rank",),
        solver="whitened_svd",
        source="Eckart and Young in K-FAC's metric; a diagonal of it: FWSVD (Hsu et al., 2022, arXiv:2207.00112)",
        needs="calibration text",
        defaults=Options(rank=64, damping=0.01),
    ),
    Method(
        name="curing",
        curvature="gram",
        constraints=("low_rank",),
        solver="rows_and_columns",
        source="Park and Moon, 2025, arXiv:2501.04211",
        needs="calibration text",
        defaults=Options(rank=64, damping=0.01),
    ),
)
