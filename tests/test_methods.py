"""The table of methods: each row is a valid triple, and what it cannot take it refuses by name."""

import pytest

from hesse.constraints import Grid, LowRank, Sparse, SparseGrid
from hesse.errors import OptionError
from hesse.methods import METHODS, Options, Recipe, find_method

OPTION_VALUES = {
    "bits": Options(bits=3),
    "sparsity": Options(sparsity="2:4"),
    "rank": Options(rank=8),
    "act_order": Options(act_order=False),
    "damping": Options(damping=0.1),
}
TAKES = {
    "rtn": {"bits"},
    "gptq": {"bits", "sparsity", "act_order", "damping"},
    "kronecker": {"bits", "damping"},
    "magnitude": {"bits", "sparsity"},
    "wanda": {"bits", "sparsity"},
    "sparsegpt": {"bits", "sparsity", "act_order", "damping"},
    "svd": {"rank"},
    "activation-svd": {"rank", "damping"},
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_builds_its_triple(name: str) -> None:
    (rule,) = find_method(name).recipe(Options()).rules
    constraint = rule.constraint.build()
    expected = {"grid": Grid, "sparse": Sparse, "low_rank": LowRank}[METHODS[name].constraints[0]]
    assert isinstance(constraint, expected)
    rule.solver.build()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("option", OPTION_VALUES)
def test_an_option_is_taken_or_refused_by_name(name: str, option: str) -> None:
    if option in TAKES[name]:
        find_method(name).recipe(OPTION_VALUES[option])
    else:
        with pytest.raises(OptionError, match=f"--{option.replace('_', '-')} has no meaning for the method {name}"):
            find_method(name).recipe(OPTION_VALUES[option])


@pytest.mark.parametrize("name", ["gptq", "magnitude", "wanda", "sparsegpt"])
def test_sparsity_and_bits_together_are_solved_jointly(name: str) -> None:
    (rule,) = find_method(name).recipe(Options(bits=4, sparsity="2:4", group_size=64)).rules
    headroom = METHODS[name].defaults.headroom or 0.0
    assert rule.constraint.build() == SparseGrid(Sparse(2, 4), Grid(4, 64, headroom=headroom))


def test_signed_scales_are_an_option_of_symmetric_grids() -> None:
    (rule,) = find_method("gptq").recipe(Options(signed=True)).rules
    assert rule.constraint.grid is not None
    assert rule.constraint.grid.signed
    with pytest.raises(OptionError, match="--signed has no meaning for an asymmetric grid"):
        find_method("gptq").recipe(Options(signed=True, symmetric=False))
    find_method("kronecker").recipe(Options(symmetric=False))  # whose own choice is signed


def test_group_size_needs_bits_in_a_pruning_method() -> None:
    with pytest.raises(OptionError, match="--group-size has no meaning for the method sparsegpt without --bits"):
        find_method("sparsegpt").recipe(Options(group_size=64))


def test_the_first_rule_that_matches_counts_and_ignore_comes_before_all() -> None:
    recipe = Recipe.model_validate(
        {
            "rules": [
                {
                    "layers": [pattern],
                    "curvature": "gram",
                    "constraint": {"grid": {"bits": bits}},
                    "solver": {"name": "error_feedback"},
                }
                for pattern, bits in (("*.mlp.*", 3), ("down_proj", 8), ("*", 4))
            ],
            "ignore": ["layers.0.*"],
        }
    )
    bits = {
        name: (rule := recipe.rule_for(name)) and rule.constraint.grid and rule.constraint.grid.bits
        for name in ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj", "model.layers.1.self_attn.q_proj")
    }
    assert bits == {
        "model.layers.0.mlp.up_proj": None,
        "model.layers.1.mlp.down_proj": 3,
        "model.layers.1.self_attn.q_proj": 4,
    }
