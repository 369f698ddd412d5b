"""Methods that rewrite the model before rounding it to a grid."""

from hesse.methods.method import Method
from hesse.methods.table import register
from hesse.options import Options

FAMILIES = "Llama, Mistral, Qwen2, Qwen3 or Gemma"
WIDER = "Llama, Mistral, Qwen2, Qwen3 or Gemma 1 to 3"

register(
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
        name="rsq",
        rewrite="hadamard",
        curvature="weighted_gram",
        constraints=("grid",),
        solver="error_feedback",
        source="Sung et al., 2025, arXiv:2503.01820, positions weighed by the attention that they receive",
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
    Method(
        name="awq",
        rewrite="activation_aware",
        curvature="identity",
        constraints=("grid",),
        solver="nearest",
        source="Lin et al., 2023, arXiv:2306.00978, the scales taken into the layers before",
        needs=f"calibration text; {WIDER}; awq-dense elsewhere",
        defaults=Options(bits=4, group_size=128, symmetric=True, headroom=0.06),
    ),
    Method(
        name="smoothquant",
        rewrite="smoothing",
        curvature="identity",
        constraints=("grid",),
        solver="nearest",
        source="Xiao et al., 2022, arXiv:2211.10438, how much is moved searched for in each place",
        needs=f"calibration text; {WIDER}; inputs are rounded too",
        defaults=Options(bits=8, group_size=-1, symmetric=True, headroom=0.06, input_bits=8),
    ),
    Method(
        name="qqq",
        rewrite="outlier_smoothing",
        curvature="gram",
        constraints=("grid",),
        solver="error_feedback",
        source="Zhang et al., 2024, arXiv:2406.09904, with dynamic scales of inputs",
        needs=f"calibration text; {WIDER}; inputs are rounded too",
        defaults=Options(
            bits=4, group_size=128, symmetric=True, headroom=0.25, act_order=True, damping=0.01, input_bits=8
        ),
    ),
    family="rewriting",
)
