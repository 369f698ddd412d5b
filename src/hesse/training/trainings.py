"""Trainings that methods name as their solver: parametrizations of a model's weights, and step rules."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from hesse.constraints import Constraint, Grid, SignRankOne, Sparse
from hesse.errors import OptionError
from hesse.methods import Method, Options, Recipe, Rule, SolverOptions
from hesse.methods.constraint_parts import parse_sparsity
from hesse.registry import Registry
from hesse.training.compression_aware import CompressionAware
from hesse.training.held import Held, HeldCodes, OneBit, StraightThrough, held_zeros
from hesse.training.loop import StepRule
from hesse.training.movement import Movement, share_of
from hesse.training.prunable import prunable
from hesse.training.schedules import SCHEDULES
from hesse.training.training import Training

# Parametrizations by the names of the weights, and the step rule; None for the plain gradient.
TrainingSetup = tuple[Mapping[str, Held], StepRule | None]


@dataclass(frozen=True, eq=False)
class TrainingRequest:
    """A method with its options, for the layers that match one of `layers` and none of `ignore`."""

    model: nn.Module
    training: Training
    method: Method
    options: Options
    layers: Sequence[str] = ("*",)
    ignore: Sequence[str] = ()

    def setting(self, name: str) -> Any:
        """Return one of the method's settings, given or by default."""
        return self.options.own.get(name, self.method.setting(name))

    def weights(self) -> dict[str, Constraint]:
        """Return the method's constraint for each weight that it trains, by the weight's name in the model.

        Raises:
            HesseError: the model has no such weight, a pattern matches none, or the constraint does not fit one.
        """
        options = self.method.constraint(self.options)
        rule = Rule(
            layers=tuple(self.layers), curvature="identity", constraint=options, solver=SolverOptions(name="nearest")
        )
        constraint = options.build()
        chosen = prunable(self.model, Recipe(rules=(rule,), ignore=tuple(self.ignore)))
        unstructured = isinstance(constraint, Sparse) and constraint.of is None and constraint.scope == "layer"
        for name, layer in chosen.items():
            if layer.transposed and not (
                unstructured or isinstance(constraint, SignRankOne)
            ):  # which allow a transpose
                raise OptionError(f"{name} is kept as (in, out), so its rows are not those of {constraint}: ignore it")
        return dict.fromkeys(chosen, constraint)


@dataclass(frozen=True)
class TrainingEntry:
    """A training that methods can name; `set_up` says what it holds for a request."""

    name: str
    set_up: Callable[[TrainingRequest], TrainingSetup]
    takes_parts: bool = True  # the options of the method's constraints have a meaning


def hold_zeros(request: TrainingRequest) -> TrainingSetup:
    """Hold what is zero in the model at zero (Han et al., 2015)."""
    return held_zeros(request.model), None


def hold_codes(request: TrainingRequest) -> TrainingSetup:
    """Hold the codes of a grid, and train its scales (PEQA)."""
    parameters, held = dict(request.model.named_parameters()), dict[str, Held]()
    for name, grid in request.weights().items():
        if not isinstance(grid, Grid):
            raise OptionError(f"{request.method.name} trains the scales of a Grid, not of a {type(grid).__name__}")
        held[name] = HeldCodes(grid, grid.encode(parameters[name].detach().flatten(1)))
    return held, None


def hold_straight_through(request: TrainingRequest) -> TrainingSetup:
    """Hold each weight in its constraint, with straight-through gradients."""
    return {name: StraightThrough(constraint) for name, constraint in request.weights().items()}, None


def train_movement(request: TrainingRequest) -> TrainingSetup:
    """Train weights and scores, and keep the weights of the highest scores."""
    held: dict[str, Held] = {}
    for name, pattern in request.weights().items():
        if not isinstance(pattern, Sparse):
            raise OptionError(f"{request.method.name} prunes to a Sparse, not to a {type(pattern).__name__}")
        schedule = SCHEDULES.find(request.method.schedule or "cubic")(
            share_of(pattern), request.training.steps, request.setting("cuts"), 0.0, request.setting("rest")
        )
        held[name] = Movement(pattern, schedule)
    return held, None


def train_compression_aware(request: TrainingRequest) -> TrainingSetup:
    """Train all weights to be robust to pruning at random patterns."""
    patterns = tuple(parse_sparsity(text.strip()) for text in str(request.setting("patterns")).split(","))
    return {}, CompressionAware(tuple(request.weights()), patterns, float(request.setting("rho")))


def train_signs(request: TrainingRequest) -> TrainingSetup:
    """Train signs and two vectors of each weight."""
    return dict.fromkeys(request.weights(), OneBit()), None


TRAININGS: Registry[TrainingEntry] = Registry("training")
for _entry in (
    TrainingEntry("held_zeros", hold_zeros, takes_parts=False),
    TrainingEntry("held_codes", hold_codes),
    TrainingEntry("straight_through", hold_straight_through),
    TrainingEntry("movement_scores", train_movement),
    TrainingEntry("compression_aware", train_compression_aware, takes_parts=False),
    TrainingEntry("signs_and_vectors", train_signs),
):
    TRAININGS.register(_entry.name, _entry)
