"""A method of the literature: a named triple curvature × constraint × solver with its usual options."""

from dataclasses import dataclass, fields, replace

from hesse.errors import OptionError
from hesse.methods.constraint_options import Basis, ConstraintOptions
from hesse.methods.constraint_parts import PARTS, parse_sparsity
from hesse.methods.recipe import Recipe, Rewrite, Rule
from hesse.methods.row import Row
from hesse.methods.solver_options import ORDERED, UNDAMPED, SolverOptions


@dataclass(frozen=True)
class Options:
    """What the command line can change about a method; None leaves the method's own choice."""

    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    headroom: float | None = None
    signed: bool | None = None
    sparsity: str | float | None = None
    scope: str | None = None
    block: int | None = None
    rank: int | None = None
    outliers: float | None = None
    table: str | None = None
    vector_length: int | None = None
    books: int | None = None
    act_order: bool | None = None
    damping: float | None = None
    input_bits: int | None = None

    def over(self, defaults: "Options") -> "Options":
        """These options where given, `defaults` elsewhere."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        return replace(defaults, **given)


@dataclass(frozen=True)
class Method:
    """A row of the table of methods.

    `constraints` are those the method always has, `optional` those an option may add (so that GPTQ with a sparsity is
    joint pruning and quantisation). `rewrite` is done to the model before, and leaves its function as it is.
    """

    name: str
    curvature: str
    constraints: tuple[str, ...]
    solver: str
    source: str
    needs: str
    defaults: Options = Options()
    optional: tuple[str, ...] = ()
    basis: Basis = "own"
    rewrite: Rewrite | None = None

    @property
    def row(self) -> Row:
        """What the table says of it."""
        run = f"hesse compress MODEL OUT --method {self.name}"
        triple = (self.curvature, self.constraints, self.solver)
        return Row(self.name, *triple, self.source, self.needs, run, self.optional, self.basis, self.rewrite)

    def recipe(self, options: Options, ignore: tuple[str, ...] = ()) -> Recipe:
        """The recipe that applies this method with `options` to every layer that is not ignored.

        Raises:
            OptionError: the method does not have one of the options, or a value has no meaning.
        """
        self._refuse_foreign(options)
        chosen = options.over(self.defaults)
        sparse = parse_sparsity(chosen.sparsity) if chosen.sparsity is not None else None
        pattern = (sparse is not None and sparse.of is not None) or (chosen.block or 1) > 1
        descending = bool(chosen.act_order) and not pattern
        if options.act_order and pattern:
            raise OptionError("--act-order would tear the groups of N:M or the blocks apart: leave one of the two out")
        if options.signed and not chosen.symmetric:
            raise OptionError("--signed has no meaning for an asymmetric grid, which has zero points: leave one out")
        constraint = self._constraint(chosen)
        constraint.build()
        solver = SolverOptions(
            name=self.solver,
            order="descending" if descending else "given",
            **({} if chosen.damping is None else {"damping": _damping(chosen.damping)}),
        )
        if chosen.input_bits is not None and not 2 <= chosen.input_bits <= 8:
            raise OptionError(f"--input-bits is {chosen.input_bits}, but must be between 2 and 8")
        rule = Rule(curvature=self.curvature, constraint=constraint, solver=solver, input_bits=chosen.input_bits)
        return Recipe(method=self.name, rules=(rule,), ignore=ignore, rewrite=self.rewrite)

    def _constraint(self, chosen: Options) -> ConstraintOptions:
        """The parts that the method has, always or because an option asks for them."""
        options = {field.name: getattr(chosen, field.name) for field in fields(chosen)}
        parts = {name: PARTS[name].chosen(options) for name in self._parts(chosen)}
        return ConstraintOptions(**parts, basis=self.basis)  # type: ignore[arg-type]

    def _parts(self, chosen: Options) -> list[str]:
        """Of the parts that the method can have, those that are there with such options."""
        asked = {name: PARTS[name].asked_by() for name in (*self.constraints, *self.optional)}
        return [name for name, option in asked.items() if option is None or getattr(chosen, option) is not None]

    def _refuse_foreign(self, options: Options) -> None:
        """Raise OptionError for an option that would have no effect in this method."""
        if options.bits == 0:
            raise OptionError("bits is 0, but a Grid has 2 to 8")
        there = self._parts(options.over(self.defaults))
        possible = {
            option: name for name in (*self.constraints, *self.optional) for option in PARTS[name].takes.values()
        }
        allowed = {option for name in there for option in PARTS[name].takes.values()}
        allowed |= {name for name, has in self._of_solver(there).items() if has}
        for field in fields(options):
            if getattr(options, field.name) is not None and field.name not in allowed:
                asked = PARTS[possible[field.name]].asked_by() if field.name in possible else None
                reason = "" if asked is None else f"without {_flag(asked)}"
                meant = f"{_flag(field.name)} has no meaning for the method {self.name} {reason}".rstrip()
                raise OptionError(f"{meant}: `hesse methods` shows which has it")

    def _of_solver(self, there: list[str]) -> dict[str, bool]:
        """Whether the options that are no part's have a meaning."""
        return {
            "act_order": self.solver in ORDERED,
            "damping": self.solver not in UNDAMPED,
            "input_bits": "grid" in there and self.basis == "own",
        }


def _flag(option: str) -> str:
    return "--" + option.replace("_", "-")


def _damping(value: float) -> float:
    if not 0 <= value <= 1e4:
        raise OptionError(f"damping is {value}, but must be between 0 and 10000; 0.01 is usual")
    return value
