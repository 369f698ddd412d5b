"""Methods that rewrite the model before they put it on a grid."""

from hesse.methods.method import Method, Options

FAMILIES = "Llama, Mistral, Qwen2, Qwen3 or Gemma"

METHODS = (
    Method(
        name="quarot",
        rewrite="hadamard",
        curvature="gram",
        constraints=("grid",),
        solver="error_feedback",
        source="Ashkboos et al., 2024, arXiv:2404.00456, what of it is free at run time",
        needs=f"calibration text; {FAMILIES}",
        defaults=Options(bits=4, group_size=128, symmetric=True, headroom=0.25, act_order=True, damping=0.01),
    ),
    Method(
        name="kurtail",
        rewrite="kurtail",
        curvature="gram",
        constraints=("grid",),
        solver="error_feedback",
        source="Akhondzadeh et al., 2025, arXiv:2503.01483, what of it is free at run time",
        needs=f"calibration text; {FAMILIES}",
        defaults=Options(bits=4, group_size=128, symmetric=True, headroom=0.25, act_order=True, damping=0.01),
    ),
)
