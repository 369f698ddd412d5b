"""A method of the literature: a named triple curvature × constraint × solver with its usual options."""

from dataclasses import dataclass, fields, replace

from hesse.errors import OptionError
from hesse.methods.recipe import (
    ConstraintOptions,
    GridOptions,
    LowRankOptions,
    Recipe,
    Rule,
    SolverOptions,
    SparseOptions,
    parse_sparsity,
)

GRID_OPTIONS = ("group_size", "symmetric", "headroom", "signed")  # that mean something with bits only


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
    rank: int | None = None
    act_order: bool | None = None
    damping: float | None = None

    def over(self, defaults: "Options") -> "Options":
        """These options where given, `defaults` elsewhere."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        return replace(defaults, **given)


@dataclass(frozen=True)
class Method:
    """A row of the table of methods.

    `constraints` are those the method always has, `optional` those an option may add (so that GPTQ with a sparsity is
    joint pruning and quantisation).
    """

    name: str
    curvature: str
    constraints: tuple[str, ...]
    solver: str
    source: str
    needs: str
    defaults: Options = Options()
    optional: tuple[str, ...] = ()

    def recipe(self, options: Options, ignore: tuple[str, ...] = ()) -> Recipe:
        """The recipe that applies this method with `options` to every layer that is not ignored.

        Raises:
            OptionError: the method does not have one of the options, or a value has no meaning.
        """
        self._refuse_foreign(options)
        chosen = options.over(self.defaults)
        sparse = parse_sparsity(chosen.sparsity) if chosen.sparsity is not None else None
        pattern = sparse is not None and sparse.of is not None
        descending = bool(chosen.act_order) and not pattern
        if options.act_order and pattern:
            raise OptionError("--act-order would tear the groups of an N:M pattern apart: leave one of the two out")
        if options.signed and not chosen.symmetric:
            raise OptionError("--signed has no meaning for an asymmetric grid, which has zero points: leave one out")
        constraint = ConstraintOptions(
            grid=_given(GridOptions, chosen, ("bits", *GRID_OPTIONS)) if chosen.bits else None,
            sparse=SparseOptions(amount=chosen.sparsity, scope=chosen.scope or "layer")  # type: ignore[arg-type]
            if chosen.sparsity is not None
            else None,
            low_rank=LowRankOptions(rank=chosen.rank) if chosen.rank is not None else None,
        )
        constraint.build()
        solver = SolverOptions(
            name=self.solver,  # type: ignore[arg-type]
            order="descending" if descending else "given",
            **({} if chosen.damping is None else {"damping": _damping(chosen.damping)}),
        )
        rule = Rule(curvature=self.curvature, constraint=constraint, solver=solver)  # type: ignore[arg-type]
        return Recipe(method=self.name, rules=(rule,), ignore=ignore)

    def _refuse_foreign(self, options: Options) -> None:
        """Raise OptionError for an option that would have no effect in this method."""
        has = {*self.constraints, *self.optional}
        grid = "grid" in has and (options.bits or self.defaults.bits)
        allowed = {
            "bits": "grid" in has,
            **dict.fromkeys(GRID_OPTIONS, grid),
            "sparsity": "sparse" in has,
            "scope": "sparse" in has,
            "rank": "low_rank" in has,
            "act_order": self.solver == "error_feedback",
            "damping": self.solver in ("error_feedback", "two_sided_feedback", "whitened_svd"),
        }
        if options.bits == 0:
            raise OptionError("bits is 0, but a Grid has 2 to 8")
        for field in fields(options):
            if getattr(options, field.name) is not None and not allowed[field.name]:
                option = "--" + field.name.replace("_", "-")
                reason = "without --bits" if field.name in GRID_OPTIONS and "grid" in has else ""
                meant = f"{option} has no meaning for the method {self.name} {reason}".rstrip()
                raise OptionError(f"{meant}: `hesse methods` shows which has it")


def _given(kind: type[GridOptions], options: Options, names: tuple[str, ...]) -> GridOptions:
    return kind(**{name: getattr(options, name) for name in names if getattr(options, name) is not None})


def _damping(value: float) -> float:
    if not 0 <= value <= 1e4:
        raise OptionError(f"damping is {value}, but must be between 0 and 10000; 0.01 is usual")
    return value
