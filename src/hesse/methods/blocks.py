"""Methods that remove whole blocks from a model, or hidden units from all blocks."""

from hesse.methods.method import Method
from hesse.methods.table import register

register(
    Method(
        name="drop-blocks",
        curvature=None,
        constraints=("sparse",),
        partition="blocks",
        score="measured loss",
        solver="greedy",
        source="AxFormer (arXiv:2010.03688); by cosines ShortGPT (Men et al., 2024, arXiv:2403.03853)",
        needs="some text",
        verb="drop_blocks",
    ),
    Method(
        name="flexigpt",
        curvature="gram",
        constraints=("low_rank",),
        partition="blocks",
        solver="whitened_svd",
        source="Smith et al., 2025, arXiv:2501.14713, without its fine-tuning",
        needs="calibration text; stored dense, since no loader shares blocks",
        verb="share_blocks",
    ),
    Method(
        name="modegpt-mlp",
        curvature="gram",
        constraints=("sparse",),
        partition="hidden units",
        score="ridge leverage scores",
        solver="least squares",
        source="Lin et al., 2024, arXiv:2408.09632, its feed-forward part",
        needs="calibration text",
        verb="narrow",
    ),
    family="blocks",
)
