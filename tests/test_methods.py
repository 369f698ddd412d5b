"""The table of methods: each row is a valid triple, and what it cannot take it refuses by name."""

from collections.abc import Iterator
from typing import Any

import pytest

from hesse.constraints import (
    BlockTable,
    Codebook,
    EitherSide,
    Grid,
    LowRank,
    Microscaled,
    MixedGrid,
    Plus,
    Rotated,
    SalientColumns,
    ScaledColumns,
    SignRankOne,
    Sparse,
    SparseGrid,
    Table,
    VectorCodebook,
)
from hesse.errors import OptionError
from hesse.layerwise.layer_solver import check_products
from hesse.methods import METHODS, Options, Recipe, find_method, find_methods, methods_of

COMPRESSING = methods_of("compress")

OPTION_VALUES = {
    "bits": Options(bits=3),
    "sparsity": Options(sparsity="2:4"),
    "rank": Options(rank=8),
    "outliers": Options(outliers=0.02),
    "table": Options(table="nf4"),
    "act_order": Options(act_order=False),
    "damping": Options(damping=0.1),
}
SAID_AS = {
    "sparsity": ("amount", "2:4"),
    "outliers": ("share", 0.02),
    "table": ("name", "nf4"),
    "act_order": ("order", "given"),
}
PARTS = {
    "grid": Grid,
    "sparse": Sparse,
    "low_rank": LowRank,
    "codebook": Codebook,
    "table": Table,
    "block_table": BlockTable,
    "microscaled": Microscaled,
    "salient": SalientColumns,
    "sign_rank_one": SignRankOne,
    "vector_codebook": VectorCodebook,
}


@pytest.mark.parametrize("name", COMPRESSING)
def test_every_method_builds_its_triple(name: str) -> None:
    (rule,) = find_method(name).recipe(Options()).rules
    constraint, parts = rule.constraint.build(), COMPRESSING[name].constraints
    if COMPRESSING[name].basis != "own":
        assert isinstance(constraint, ScaledColumns | Rotated | EitherSide | MixedGrid)
        constraint = constraint.base
    assert isinstance(constraint, Plus if len(parts) == 2 else PARTS[parts[0]])
    if isinstance(constraint, Plus):
        assert isinstance(constraint.base, PARTS[parts[0]])
    rule.solver.build()
    check_products(rule)


def entries(content: Any) -> Iterator[tuple[str, Any]]:
    """All keys and values, at any depth."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield key, value
            yield from entries(value)


@pytest.mark.parametrize("name", COMPRESSING)
@pytest.mark.parametrize("option", OPTION_VALUES)
def test_an_option_is_in_the_recipe_or_refused_by_name(name: str, option: str) -> None:
    refused = ""
    try:
        rules = find_method(name).recipe(OPTION_VALUES[option]).rules
    except OptionError as error:
        refused = str(error)
    if refused:
        assert f"--{option.replace('_', '-')} has no meaning for the method {name}" in refused
        assert getattr(COMPRESSING[name].defaults, option) is None
    else:
        key, value = SAID_AS.get(option, (option, getattr(OPTION_VALUES[option], option)))
        assert (key, value) in list(entries(rules[0].model_dump()))


@pytest.mark.parametrize("name", ["gptq", "magnitude", "wanda", "sparsegpt"])
def test_sparsity_and_bits_together_are_solved_jointly(name: str) -> None:
    (rule,) = find_method(name).recipe(Options(bits=4, sparsity="2:4", group_size=64)).rules
    headroom = COMPRESSING[name].defaults.headroom or 0.0
    assert rule.constraint.build() == SparseGrid(Sparse(2, 4), Grid(4, 64, headroom=headroom))


def test_signed_scales_are_an_option_of_symmetric_grids() -> None:
    (rule,) = find_method("gptq").recipe(Options(signed=True)).rules
    assert rule.constraint.grid is not None
    assert rule.constraint.grid.signed
    with pytest.raises(OptionError, match="--signed has no meaning for an asymmetric grid"):
        find_method("gptq").recipe(Options(signed=True, symmetric=False))
    find_method("kronecker").recipe(Options(symmetric=False))  # whose own choice is signed


def test_a_scope_is_one_of_four_and_not_of_a_pattern() -> None:
    with pytest.raises(OptionError, match="there is no scope 'model'; there are layer, row, global, lamp"):
        find_method("magnitude").recipe(Options(scope="model"))
    with pytest.raises(OptionError, match="a pattern such as 2:4 is the same everywhere"):
        find_method("magnitude").recipe(Options(sparsity="2:4", scope="lamp"))


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


@pytest.mark.parametrize("row", [name for name in METHODS if name.endswith("-groups")])
def test_a_method_of_groups_is_found_with_and_without_its_ending(row: str) -> None:
    name = row.removesuffix("-groups")
    assert find_methods([row]) == {METHODS[row].family: (METHODS[row],)}
    meant = METHODS[name] if name in METHODS else METHODS[row]
    assert find_methods([name]) == {meant.family: (meant,)}


def test_an_unknown_name_is_refused_with_and_without_the_ending_of_groups() -> None:
    for name in ("gtpq", "gtpq-groups", "obs-groups-groups"):
        with pytest.raises(OptionError, match=f"there is no method or family '{name}'"):
            find_methods([name])


def test_a_method_that_gives_its_own_ranks_lists_no_options() -> None:
    assert METHODS["acip"].options() == ()
    assert [option.name for option in METHODS["kronecker-svd"].options()] == ["rank", "damping"]
    with pytest.raises(OptionError, match="the method acip has no option 'rank': it has none"):
        METHODS["acip"].check_options(Options(rank=4))
