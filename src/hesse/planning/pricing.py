"""Divide one budget among the parameters of a module in memory, by any predictor of costs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hesse.constraints import Grid
from hesse.curvature import Curvature, Objective
from hesse.methods import METHODS, methods_of
from hesse.methods.curvatures import LOSS_CURVATURES
from hesse.planning.joint_layers import dependent_blocks, joint_problem, single_choice
from hesse.planning.planners import PLANNERS
from hesse.planning.problem import Candidate, Choice, ChoiceGroup, Problem
from hesse.planning.solve import cheapest_within
from hesse.scores.interactions import interactions
from hesse.scores.sensitivities import predicted_costs

THRESHOLD = 0.1  # relative interaction above which two layers are planned together
MOST_JOINED = 3  # layers
LAYER_BLOCKS = "layer-blocks"  # a partition: consecutive layers that interact


@dataclass(frozen=True, eq=False)
class Member:
    """A candidate for the value of a parameter."""

    label: str
    size: int  # bytes
    weight: Tensor  # in the parameter's shape


Menu = Mapping[str, Sequence[Member]]  # by parameter


def grid_menu(
    objective: Objective, bits: Sequence[int] = (8, 4, 3, 2), group_size: int = -1
) -> dict[str, list[Member]]:
    """Return a menu of each parameter of the objective rounded to nearest with `bits`; sizes include scales.

    A parameter of more than two dimensions is rounded as a matrix (out, all others). Leave parameters that must not
    change, such as biases and norms, out of the objective's `names`.
    """
    menu: dict[str, list[Member]] = {}
    for name, parameter in objective.named.items():
        weight = parameter.detach()
        matrix = weight.reshape(len(weight), -1)
        menu[name] = []
        for each in bits:
            grid = Grid(each, group_size)
            size = round(grid.bits_per_weight(matrix.shape) * matrix.numel() / 8)
            menu[name].append(Member(f"{each} bits", size, grid.nearest(matrix).view_as(weight)))
    return menu


def changes_of(objective: Objective, menu: Menu) -> dict[str, list[Tensor]]:
    """Return the change by each member of a menu."""
    return {name: [member.weight - objective.named[name].detach() for member in own] for name, own in menu.items()}


def menu_problem(menu: Menu, costs: Mapping[str, Sequence[float]]) -> Problem:
    """Return a menu with predicted costs as a planning problem."""
    return Problem(
        tuple(
            ChoiceGroup(name, tuple(Candidate(m.label, m.size, cost) for m, cost in zip(own, costs[name], strict=True)))
            for name, own in menu.items()
        )
    )


@dataclass(frozen=True)
class Pricing:
    """Predicted costs of the members of a menu, for budgets of any size.

    Groups of one block are planned together, as one group of `joint`.
    """

    problem: Problem  # a group for each parameter
    joint: Problem
    blocks: list[list[int]]  # indices of groups
    planner: Callable[[Problem, Any], Choice]

    def choose(self, limit: Any) -> Choice:
        """Return the choice of the method's own planner within `limit`, as indices of members.

        `limit` is a size in bytes, or for a method that plans by bisection a function that accepts a choice or not.

        Raises:
            OptionError: no choice is within the limit; the message says what would be.
        """
        return single_choice(self.problem, self.blocks, self.planner(self.joint, limit))

    def cheapest(self, size: int) -> Choice:
        """Return the members of least predicted cost within `size` bytes in total, as indices.

        Raises:
            OptionError: the smallest members do not fit; the message says what would.
        """
        return single_choice(self.problem, self.blocks, cheapest_within(self.joint, size))


def price(
    objective: Objective,
    menu: Menu,
    method: str = "second-order",
    curvature: Callable[[Objective], Curvature] | None = None,
) -> Pricing:
    """Return the predicted costs of all members of `menu`, with the planner that chooses among them.

    `method` is a row of `hesse methods allocation` for modules in memory: its score predicts the costs, under its
    curvature unless another is given. If its partition is blocks of layers, consecutive layers whose changes interact
    are planned as one, with all interactions counted. `method` may also be a score of changes; the planner is then the
    knapsack.

    Raises:
        OptionError: there is no such method or score.
    """
    row = METHODS[method] if method in methods_of("price") | methods_of("allocate") else None
    name, planner = (method, "knapsack") if row is None else (row.score or "second-order", row.solver)
    if curvature is None:
        known = [own for own in (() if row is None else row.curvatures) if own in LOSS_CURVATURES]
        curvature = LOSS_CURVATURES[(known or ["gauss_newton"])[0]]
    changes, choose = changes_of(objective, menu), PLANNERS.find(planner)
    if row is None or row.partition != LAYER_BLOCKS:
        problem = menu_problem(menu, predicted_costs(objective, changes, name, curvature))
        return Pricing(problem, problem, [[place] for place in range(len(menu))], choose)
    costs = interactions(curvature(objective), objective, changes)
    parts = torch.split(costs.diagonal().clamp(min=0), [len(own) for own in menu.values()])
    problem = menu_problem(menu, {name: part.tolist() for name, part in zip(menu, parts, strict=True)})
    lasts = torch.tensor([len(own) for own in menu.values()]).cumsum(0) - 1
    blocks = dependent_blocks(costs[lasts][:, lasts], THRESHOLD, MOST_JOINED)
    return Pricing(problem, joint_problem(problem, costs, blocks), blocks, choose)


def allocate(objective: Objective, menu: Menu, size: int, method: str = "second-order") -> Choice:
    """Return the members of `menu` of least predicted cost within `size` bytes, as indices.

    Raises:
        OptionError: there is no such method, or the smallest members do not fit; the message says what would.
    """
    return price(objective, menu, method).cheapest(size)


def use(objective: Objective, menu: Menu, choice: Choice) -> None:
    """Set the parameters to the chosen members."""
    for (name, own), place in zip(menu.items(), choice, strict=True):
        objective.named[name].data.copy_(own[place].weight)
