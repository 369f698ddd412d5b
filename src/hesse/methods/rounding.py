"""Methods that put weights on a grid."""

from hesse.methods.method import Method, Options

METHODS = (
    Method(
        name="rtn",
        curvature="identity",
        constraints=("grid",),
        solver="nearest",
        source="round to nearest",
        needs="no data, except to predict the cost",
        defaults=Options(bits=4, group_size=128, symmetric=True, headroom=0.06),
    ),
    Method(
        name="gptq",
        curvature="gram",
        constraints=("grid",),
        optional=("sparse",),
        solver="error_feedback",
        source="Frantar et al., 2022, arXiv:2210.17323",
        needs="calibration text",
        defaults=Options(bits=4, group_size=128, symmetric=True, headroom=0.25, act_order=True, damping=0.01),
    ),
    Method(
        name="kronecker",
        curvature="kronecker",
        constraints=("grid",),
        solver="two_sided_feedback",
        source="GPTQ's update on K-FAC's curvature (Martens and Grosse, 2015, arXiv:1503.05671)",
        needs="calibration text",
        defaults=Options(bits=4, group_size=128, symmetric=True, headroom=1.0, signed=True, damping=0.01),
    ),
)
