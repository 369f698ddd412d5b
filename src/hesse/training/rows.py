"""Rows of the table that need training: loops over a user's model and data."""

from hesse.methods import Method, Options, register

NEEDS = "training data and a loss"

register(
    Method(
        name="finetune",
        curvature=None,
        constraints=("sparse",),
        optional=("grid", "codebook", "table"),
        solver="held_zeros",
        source="masks: Han et al., 2015; codes: Kim et al., 2023, arXiv:2305.14152; others: straight-through",
        needs=NEEDS,
        verb="finetune",
    ),
    Method(
        name="gmp",
        curvature="identity",
        constraints=("sparse",),
        solver="nearest",
        schedule="cubic",
        source="Kurtic and Alistarh, 2022, arXiv:2210.06384 (GMP*)",
        needs=f"{NEEDS}; a dense teacher",
        defaults=Options(sparsity=0.5),
        verb="prune_gradually",
    ),
    Method(
        name="gradual-obert",
        curvature="fisher_blocks",
        constraints=("sparse",),
        solver="greedy_surgeon",
        schedule="cubic",
        source="Kurtic et al., 2022, arXiv:2203.07259; so does every other row that prunes",
        needs=f"{NEEDS}; a dense teacher",
        defaults=Options(sparsity=0.5, damping=1.0),
        verb="prune_gradually",
    ),
    Method(
        name="movement",
        curvature=None,
        constraints=("sparse",),
        solver="movement",
        schedule="cubic",
        source="Sanh et al., 2020, arXiv:2005.07683",
        needs=NEEDS,
        verb="finetune",
    ),
    Method(
        name="cram",
        curvature=None,
        constraints=("sparse",),
        solver="compression_aware",
        source="Peste et al., 2022, arXiv:2207.14200 (CrAM+)",
        needs=f"{NEEDS}; two gradients a step",
        verb="finetune",
    ),
    Method(
        name="onebit-training",
        curvature=None,
        constraints=("sign_rank_one",),
        solver="one_bit",
        source="Xu et al., 2024, arXiv:2402.11295",
        needs=f"{NEEDS}; a dense teacher",
        verb="finetune",
    ),
    family="training",
)
