"""Methods that factorise weights into two thin ones."""

from hesse.methods.method import Method, Options
from hesse.methods.row import Row

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
        source="Eckart and Young in the metric of K-FAC (Martens and Grosse, 2015, arXiv:1503.05671)",
        needs="calibration text",
        defaults=Options(rank=64, damping=0.01),
    ),
    Method(
        name="fwsvd",
        curvature="fisher_columns",
        constraints=("low_rank",),
        solver="whitened_svd",
        source="Hsu et al., 2022, arXiv:2207.00112, with the true Fisher",
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
    Method(
        name="lq-lora",
        curvature="fisher_rows_columns",
        constraints=("table", "low_rank"),
        solver="plain_alternating",
        source="Guo et al., 2023, arXiv:2311.12023, with the true Fisher",
        needs="calibration text; stored dense, since no loader reads tables",
        defaults=Options(table="nf4", group_size=64, rank=32, damping=0.01),
    ),
    Method(
        name="oats",
        curvature="gram_diagonal",
        constraints=("sparse", "low_rank"),
        solver="plain_alternating",
        source="Zhang and Papyan, 2024, arXiv:2409.13652",
        needs="calibration text; stored dense, since no loader adds the factors",
        defaults=Options(sparsity=0.6, scope="row", rank=32, damping=0.0),
    ),
    Method(
        name="sparse-low-rank",
        curvature="gram",
        constraints=("sparse", "low_rank"),
        optional=("grid",),
        solver="alternating",
        source="OATS (Zhang and Papyan, 2024, arXiv:2409.13652) with SparseGPT's update in place of thresholds",
        needs="calibration text; stored dense, since no loader adds the factors",
        defaults=Options(sparsity=0.6, rank=32, damping=0.01),
    ),
)
ROWS = (
    Row(
        name="repair",
        curvature="gram, kronecker or identity",
        constraint=("what a model holds", "low_rank"),
        solver="whitened_svd",
        source="EoRA (Liu et al., 2024, arXiv:2410.21271), LoRC (Yao et al., 2023, arXiv:2303.08302)",
        needs="a dense model, what any program compressed it to, and calibration text",
        run="hesse repair DENSE COMPRESSED OUT",
    ),
)
