"""Methods that remove whole blocks of a checkpoint, or hidden units of all of its blocks."""

from hesse.methods.method import Method
from hesse.methods.table import register

register(
    Method(
        name="drop-blocks",
        curvature=None,
        constraints=("sparse",),
        partition="blocks",
        score="loss",
        solver="block_ranking",
        source="AxFormer (arXiv:2010.03688); by cosines ShortGPT (Men et al., 2024, arXiv:2403.03853)",
        needs="some text",
        verb="prune_checkpoint",
    ),
    Method(
        name="flexigpt",
        curvature="gram",
        constraints=("low_rank",),
        partition="blocks",
        solver="block_sharing",
        source="Smith et al., 2025, arXiv:2501.14713, without its fine-tuning",
        needs="calibration text; stored dense, since no loader shares blocks",
        verb="prune_checkpoint",
    ),
    Method(
        name="modegpt-mlp",
        curvature="gram",
        constraints=("sparse",),
        partition="hidden",
        solver="units_by_leverage",
        source="Lin et al., 2024, arXiv:2408.09632, its feed-forward part",
        needs="calibration text",
        verb="prune_checkpoint",
    ),
    family="blocks",
)
