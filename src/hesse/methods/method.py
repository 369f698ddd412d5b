"""A method of the literature: a named triple curvature × constraint × solver with its usual options."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from hesse.errors import OptionError
from hesse.methods.constraint_options import ConstraintOptions
from hesse.methods.constraint_parts import PARTS, parse_sparsity
from hesse.methods.curvatures import CURVATURES, LOSS_CURVATURES
from hesse.methods.recipe import Recipe, Rewrite, Rule
from hesse.methods.solver_options import SOLVERS, SolverOptions
from hesse.methods.strategies import STRATEGIES
from hesse.methods.verbs import VERBS
from hesse.options import KNOWN, Option, Options, flag, known_option, settings_of

Use = Literal["project", "evaluate", "solve"]
PRUNING = ("prune", "prune_checkpoint")  # verbs whose methods name a strategy as their solver


@dataclass(frozen=True)
class Method:
    """A row of the table of methods: names of registered objects, from which its verb builds what it runs.

    - `curvature` is a name of `CURVATURES`; None for a method that uses something else, such as its `score`.
    - `constraints` are names of `PARTS` that the method always has, `optional` those that an option may add (so that
      GPTQ with a sparsity is joint pruning and quantization); `basis` is a name of `BASES`.
    - `solver` is a name in the verb's table of solvers: `SOLVERS` for verbs that solve layers.
    - `partition` says which weights are changed together; `score` is a name in that verb's table of scores.
    - `schedule` is a name of training's `SCHEDULES`, for methods that change a network little by little.
    - `rewrite` is a rewriting of the model that precedes the method and keeps its function.
    - `defaults` are the method's own choice of the options of its constraints and solver, `settings` its other options.
    """

    name: str
    curvature: str | None
    constraints: tuple[str, ...]
    solver: str
    source: str
    needs: str
    defaults: Options = field(default_factory=Options)
    optional: tuple[str, ...] = ()
    basis: str = "own"
    rewrite: Rewrite | None = None
    verb: str = "compress"
    use: Use = "project"
    partition: str = "weights"
    score: str | None = None
    schedule: str | None = None
    other_curvatures: tuple[str, ...] = ()
    settings: tuple[Option, ...] = ()
    family: str = "own"

    def run(self, *arguments: Any, **options: Any) -> Any:
        """Run the method by its verb: `METHODS["gmp"].run(model, ...)` is `hesse.prune_gradually(model, ...)`."""
        return VERBS[self.verb].run(self.name, *arguments, **options)

    @property
    def curvatures(self) -> tuple[str, ...]:
        """Return all curvatures that the method can use, the default first."""
        return (*((self.curvature,) if self.curvature else ()), *self.other_curvatures)

    @property
    def example(self) -> str:
        """Return a command or call that runs the method."""
        return VERBS[self.verb].example.format(name=self.name, what=self.partition)

    @property
    def triple(self) -> tuple[str, str, str]:
        """Return curvature, constraint and solver as the table prints them."""
        curvature = self.curvature or "none"
        if self.other_curvatures:
            curvature += f" (or {', '.join(self.other_curvatures)})"
        if self.score is not None:
            curvature = self.score if self.curvature is None else f"{self.score} of {curvature}"
        constraint = " + ".join(self.constraints) + "".join(f" (& {name})" for name in self.optional)
        if self.basis != "own":
            constraint = f"{self.basis} {constraint}"
        if self.partition != "weights":
            constraint += f" of {self.partition}"
        return curvature, constraint, self.solver if self.schedule is None else f"{self.solver}, {self.schedule}"

    def constraint(self, options: Options) -> ConstraintOptions:
        """Return the method's constraint with `options` in place of its defaults.

        Raises:
            OptionError: a value is invalid.
        """
        return self._constraint(options.over(self.defaults))

    def options(self) -> tuple[Option, ...]:
        """Return what a call can change about the method, with defaults and help."""
        strategy = settings_of(STRATEGIES[self.solver]) if self.verb in PRUNING else ()
        return (*self._options_of_parts(), *strategy, *self.settings)

    def check_options(self, options: Options) -> None:
        """Refuse options that the method does not take.

        Raises:
            OptionError: an option would have no effect.
        """
        takes = [option.name for option in self.options()]
        for name in options.given():
            if name not in takes:
                has = f"it has {', '.join(takes)}" if takes else "it has none"
                raise OptionError(f"the method {self.name} has no option {name!r}: {has}")

    def setting(self, name: str) -> Any:
        """Return the default of one of the `settings`.

        Raises:
            OptionError: the method has no such setting.
        """
        for option in self.settings:
            if option.name == name:
                return option.default
        raise OptionError(f"the method {self.name} has no setting {name!r}")

    def to_dict(self) -> dict[str, Any]:
        """Return the row as JSON can hold it."""
        return {
            "method": self.name,
            "family": self.family,
            "verb": self.verb,
            "use": self.use,
            "curvature": self.curvature,
            "constraint": list(self.constraints),
            "optional": list(self.optional),
            "basis": self.basis,
            "partition": self.partition,
            "solver": self.solver,
            "score": self.score,
            "schedule": self.schedule,
            "rewrite": self.rewrite,
            "needs": self.needs,
            "source": self.source,
            "run": self.example,
            "options": [vars(option) for option in self.options()],
        }

    def check(self) -> None:
        """Refuse names that no table has.

        Raises:
            OptionError: a name is not registered.
        """
        VERBS.find(self.verb).solver(self.solver)
        for curvature in self.curvatures:
            if curvature not in LOSS_CURVATURES:
                CURVATURES.find(curvature)
        for part in (*self.constraints, *self.optional):
            PARTS.find(part)
        if self.verb == "compress":
            self.recipe(Options())

    @property
    def solves_layers(self) -> bool:
        """True if the method is a rule for single layers, which `recipe` gives."""
        return self.curvature is not None and self.partition == "weights" and self.solver in SOLVERS

    def recipe(self, options: Options, ignore: tuple[str, ...] = (), layers: tuple[str, ...] = ("*",)) -> Recipe:
        """Return the recipe that applies this method with `options` to each of `layers` that is not ignored.

        Raises:
            OptionError: the method does not have one of the options, or a value is invalid.
        """
        if self.curvature is None or not self.solves_layers:
            raise OptionError(f"the method {self.name} is not a rule for single layers; it runs by: {self.example}")
        self._refuse_foreign(options)
        chosen = options.over(self.defaults)
        sparse = parse_sparsity(chosen.sparsity) if chosen.sparsity is not None else None
        pattern = (sparse is not None and sparse.of is not None) or (chosen.block or 1) > 1
        descending = bool(chosen.act_order) and not pattern
        if options.act_order and pattern:
            raise OptionError("--act-order would split the groups of N:M or the blocks: leave out one of the two")
        if options.signed and not chosen.symmetric:
            raise OptionError("--signed has no meaning for an asymmetric grid, which has zero points: leave one out")
        constraint = self._constraint(chosen)
        constraint.build()
        if chosen.damping is not None and not 0 <= chosen.damping <= 1e4:
            raise OptionError(f"damping is {chosen.damping}, but must be between 0 and 10000; 0.01 is usual")
        solver = SolverOptions(
            name=self.solver,
            order="descending" if descending else "given",
            **({} if chosen.damping is None else {"damping": chosen.damping}),
            own={name: chosen.own[name] for name in self._settings() if name in chosen.own} or None,
        )
        if chosen.input_bits is not None and not 2 <= chosen.input_bits <= 8:
            raise OptionError(f"--input-bits is {chosen.input_bits}, but must be between 2 and 8")
        rule = Rule(
            layers=layers,
            curvature=self.curvature,
            constraint=constraint,
            solver=solver,
            input_bits=chosen.input_bits,
        )
        return Recipe(method=self.name, rules=(rule,), ignore=ignore, rewrite=self.rewrite)

    def _constraint(self, chosen: Options) -> ConstraintOptions:
        """Return the method's parts that it always has or that an option requests."""
        parts = {name: PARTS[name].chosen(chosen.given()) for name in self._parts(chosen)}
        return ConstraintOptions.model_validate({**parts, "basis": self.basis})

    def _parts(self, chosen: Options) -> list[str]:
        """Return the parts of the method that are present with the given options."""
        return [*self.constraints, *(name for name in self.optional if PARTS[name].asked_by() in chosen.given())]

    def _settings(self) -> list[str]:
        """Return the names of the options of the solver itself."""
        return [option.name for option in SOLVERS[self.solver].settings]

    def _options_of_parts(self) -> tuple[Option, ...]:
        """Return the options of the method's constraints and solver."""
        if not VERBS[self.verb].takes_options:
            return ()
        entry = VERBS[self.verb].solver(self.solver)
        if not (self.solves_layers or getattr(entry, "takes_parts", False)):
            return ()
        always = self._parts(self.defaults)
        known: dict[str, Option] = {}
        for name in (*self.constraints, *self.optional):
            for option in PARTS[name].options(name in always):
                known.setdefault(option.name, option)
        usual = {"damping": SolverOptions.model_fields["damping"].default, "act_order": False, "input_bits": None}
        for name in (name for name, has in self._of_solver(always).items() if has):
            known[name] = known_option(name, usual[name])
        known |= {option.name: option for option in getattr(entry, "settings", ())}
        chosen = {**{name: option.default for name, option in known.items()}, **self.defaults.given()}
        order = [option.name for option in KNOWN if option.name in known]
        return tuple(replace(known[name], default=chosen[name]) for name in dict.fromkeys((*order, *known)))

    def _refuse_foreign(self, options: Options) -> None:
        """Raise OptionError for an option that would have no effect in this method."""
        if options.bits == 0:
            raise OptionError("bits is 0, but a Grid has 2 to 8")
        there = self._parts(options.over(self.defaults))
        possible = {
            option: name for name in (*self.constraints, *self.optional) for option in PARTS[name].takes.values()
        }
        allowed = {option for name in there for option in PARTS[name].takes.values()}
        allowed |= {name for name, has in self._of_solver(there).items() if has} | {*self._settings()}
        for name in options.given():
            if name not in allowed:
                asked = PARTS[possible[name]].asked_by() if name in possible else None
                meant = self.name if asked is None else f"{self.name} without {flag(asked)}"
                raise OptionError(
                    f"{flag(name)} has no meaning for the method {meant}: `hesse methods` shows which has it"
                )

    def _of_solver(self, there: list[str]) -> dict[str, bool]:
        """Return, for each option that belongs to no part, True if it has an effect."""
        if not self.solves_layers:
            return {}
        return {
            "act_order": SOLVERS[self.solver].ordered,
            "damping": SOLVERS[self.solver].damped,
            "input_bits": self.basis == "own" and not {"grid", "table", "block_table"}.isdisjoint(there),
        }
