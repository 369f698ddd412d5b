"""Methods that set weights to zero."""

from hesse.methods.method import Method, Options

METHODS = (
    Method(
        name="magnitude",
        curvature="identity",
        constraints=("sparse",),
        optional=("grid",),
        solver="nearest",
        source="Han et al., 2015, arXiv:1506.02626",
        needs="no data, except to predict the cost",
        defaults=Options(sparsity=0.5),
    ),
    Method(
        name="wanda",
        curvature="gram_diagonal",
        constraints=("sparse",),
        optional=("grid",),
        solver="nearest",
        source="Sun et al., 2023, arXiv:2306.11695",
        needs="calibration text",
        defaults=Options(sparsity=0.5, scope="row"),
    ),
    Method(
        name="sparsegpt",
        curvature="gram",
        constraints=("sparse",),
        optional=("grid",),
        solver="error_feedback",
        source="Frantar and Alistarh, 2023, arXiv:2301.00774",
        needs="calibration text",
        defaults=Options(sparsity=0.5, damping=0.01),
    ),
)
