"""Rank the singular directions of all layers once, and cut models of any size from the ranking."""

from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor

from hesse.constraints import LowRank
from hesse.errors import OptionError, naming
from hesse.estimation import Statistics
from hesse.formats import open_networks
from hesse.layerwise.layer_solver import LayerProblem
from hesse.layerwise.rules import check_patterns
from hesse.methods import METHODS, Options, Recipe
from hesse.methods.patterns import matches
from hesse.networks.families import is_expert
from hesse.networks.network import Layer, each_loaded
from hesse.planning.problem import Candidate, ChoiceGroup, Problem
from hesse.planning.sizes import read_size
from hesse.planning.slope import by_common_slope
from hesse.progress import Progress
from hesse.solvers import WhitenedSVD

METHOD = "acip"  # gives the metric of the ranking, and computes the factors


def directions_recipe(
    model: Path,
    statistics: Statistics,
    size: str | int,
    ignore: tuple[str, ...],
    device: torch.device,
    progress: Progress,
) -> Recipe:
    """Return the recipe with each layer's rank for a total `size` of the linear layers, such as "60%" or bytes.

    The k-th singular value σ_k of a layer's C_Gᵀ W C_A saves ½ σ_k² nats per token and costs its rows and columns; the
    step to the dense weight saves the rest. Directions are ranked by savings per byte, and the recipe takes the longest
    prefix that fits, so that a smaller model's directions are a subset of a larger one's. A layer keeps at least one
    direction. One ranking of all layers is the idea of ACIP (Genzel et al., 2025, arXiv:2502.01717), which learns it.

    Raises:
        HesseError: the statistics are of another model or lack factors, or the size cannot be reached.
    """
    checkpoint, network, _ = open_networks(model, device)
    statistics.check_model(checkpoint)
    for kind in ("gram", "kronecker"):
        statistics.check_holds(kind)
    check_patterns([layer.name for layer in network.layers], (), ignore)
    layers = [layer for layer in network.layers if not any(matches(layer.name, pattern) for pattern in ignore)]
    expert = next((layer.name for layer in layers if is_expert(layer.name)), None)
    if expert is not None:
        raise OptionError(f"{expert}: single experts cannot be factorised: leave them out with --ignore '*.experts.*'")
    stored = {layer.name: network.tensors.dtype(f"{layer.name}.weight").itemsize for layer in layers}
    dense = {layer.name: layer.weight.shape.numel() * stored[layer.name] for layer in layers}
    total = sum(dense.values())
    budget = read_size(str(size), percent=total / 100)
    if budget is None or not budget < total:
        raise OptionError(f"--size is {size!r}: give less than the {total:,} bytes of the dense layers, such as 60%")
    smallest = sum(sum(layer.weight.shape) * stored[layer.name] for layer in layers)
    if budget < smallest:
        raise OptionError(f"--size {size} is below the {smallest:,} bytes of one direction a layer: give more")
    groups: list[ChoiceGroup] = []
    progress.begin("rank directions", len(network.blocks))
    wanted = {layer.name for layer in layers}
    for _, block in each_loaded(network):
        for layer in block.layers:
            if layer.name in wanted:
                values = singular_values(layer, statistics)
                groups.append(directions(layer.name, layer.weight.shape, values, stored[layer.name]))
        progress.advance()
    problem = Problem(tuple(groups))
    choice = by_common_slope(problem, int(budget))
    kept, ranks = list(ignore), defaultdict[int, list[str]](list)
    for group, candidate in zip(groups, problem.chosen(choice), strict=True):
        if candidate.label == "dense":
            kept.append(group.name)
        else:
            ranks[int(candidate.label)].append(group.name)
    rules = [
        METHODS[METHOD].recipe(Options(rank=rank)).rules[0].model_copy(update={"layers": tuple(names)})
        for rank, names in sorted(ranks.items())
    ]
    return Recipe(method="acip", rules=tuple(rules), ignore=tuple(kept))


def directions(name: str, shape: torch.Size, values: Tensor, itemsize: int) -> ChoiceGroup:
    """Return a layer's (out, in) sizes and losses at each rank and dense, from its singular `values` in the metric."""
    squares = 0.5 * values.double().square()
    left = [*squares.flip(0).cumsum(0).flip(0).tolist()[1:], 0.0]  # after 1, 2, ... directions
    whole = shape.numel() * itemsize
    sizes = [rank * sum(shape) * itemsize for rank in range(1, min(shape))]
    thin = [Candidate(str(k + 1), size, left[k]) for k, size in enumerate(sizes) if size < whole or k == 0]
    return ChoiceGroup(name, (*thin, Candidate("dense", whole, 0.0)))


def singular_values(layer: Layer, folder: Statistics) -> Tensor:
    """Return the singular values of a layer's weight in its metric, descending; zeros if no token reached it."""
    weight = layer.weight.float()
    gram = folder.gram(layer.name, weight.device)
    kronecker = folder.kronecker(layer.name, weight.device)
    if gram is None or kronecker is None:
        return weight.new_zeros(min(weight.shape))
    rule = METHODS[METHOD].recipe(Options(rank=1)).rules[0]
    statistics = {"inputs": gram, "output factor": kronecker.output_factor}
    problem = LayerProblem(layer.name, weight, statistics, rule, LowRank(1))
    solver = WhitenedSVD()
    with naming(layer.name):
        return solver.values(solver.init(rule.kind.build(problem, rule.solver, rule.solver.damping)), weight)
