"""Methods that need training: loops over a user's model and data."""

from hesse.methods.row import Row

GRADUAL = "hesse.prune_gradually(model, batches, training, 0.9, loss=loss"
RECOVER = "hesse.recover(model, batches, training, loss=loss"
NEEDS = "training data and a loss"

ROWS = (
    Row(
        name="recover",
        curvature="none",
        constraint=("sparse",),
        solver="training with masks, codes or any constraint held",
        source="masks: Han et al., 2015; codes: Kim et al., 2023, arXiv:2305.14152; others: straight-through",
        needs=NEEDS,
        run=f"{RECOVER})",
        optional=("grid", "codebook", "table"),
    ),
    Row(
        name="gmp",
        curvature="identity",
        constraint=("sparse",),
        solver="nearest, gradually",
        source="Kurtic and Alistarh, 2022, arXiv:2210.06384 (GMP*)",
        needs=f"{NEEDS}; a dense teacher",
        run=f"{GRADUAL})",
    ),
    Row(
        name="gradual-obert",
        curvature="fisher_blocks",
        constraint=("sparse",),
        solver="greedy_surgeon, gradually",
        source="Kurtic et al., 2022, arXiv:2203.07259; so does every other row that prunes",
        needs=f"{NEEDS}; a dense teacher",
        run=f'{GRADUAL}, method="obert")',
    ),
    Row(
        name="movement",
        curvature="g ⊙ w, summed over steps",
        constraint=("sparse",),
        solver="training of scores",
        source="Sanh et al., 2020, arXiv:2005.07683",
        needs=NEEDS,
        run=f"{RECOVER}, held={{name: hesse.training.Movement(pattern, schedule)}})",
    ),
    Row(
        name="cram",
        curvature="gradient at the pruned weights",
        constraint=("sparse",),
        solver="training of a dense network that is pruned later",
        source="Peste et al., 2022, arXiv:2207.14200 (CrAM+)",
        needs=f"{NEEDS}; two gradients a step",
        run=f"{RECOVER}, rule=hesse.training.CompressionAware(names))",
    ),
    Row(
        name="onebit-training",
        curvature="none",
        constraint=("sign_rank_one",),
        solver="training of signs and two vectors",
        source="Xu et al., 2024, arXiv:2402.11295",
        needs=f"{NEEDS}; a dense teacher",
        run=f"{RECOVER}, held={{name: hesse.training.OneBit()}})",
    ),
)
