"""Methods that take whole blocks out of a model, or hidden units out of all blocks."""

from hesse.methods.row import Row

ROWS = (
    Row(
        name="drop-blocks",
        curvature="none, or the true Fisher",
        constraint=("fewer blocks",),
        solver="greedy, by measured loss",
        source="AxFormer (arXiv:2010.03688); by cosines ShortGPT (Men et al., 2024, arXiv:2403.03853)",
        needs="some text",
        run="hesse drop-blocks MODEL OUT --blocks 2",
    ),
    Row(
        name="flexigpt",
        curvature="gram",
        constraint=("another block's weights, scaled", "low_rank"),
        solver="whitened_svd",
        source="Smith et al., 2025, arXiv:2501.14713, without its fine-tuning",
        needs="calibration text; stored dense, since no loader shares blocks",
        run="hesse drop-blocks MODEL OUT --blocks 2 --share-rank 32",
    ),
    Row(
        name="modegpt-mlp",
        curvature="gram",
        constraint=("fewer hidden units",),
        solver="ridge leverage scores, then least squares",
        source="Lin et al., 2024, arXiv:2408.09632, its feed-forward part",
        needs="calibration text",
        run="hesse narrow MODEL OUT --keep 0.75",
    ),
    Row(
        name="modegpt-heads",
        curvature="gram",
        constraint=("fewer dimensions a head",),
        solver="SVD of scores and of values, then least squares",
        source="Lin et al., 2024, arXiv:2408.09632, its attention part, with an SVD in place of CR",
        needs="a network of torch's own attention, data",
        run="hesse.narrow_heads(model, batches, keep=0.75)",
    ),
)
