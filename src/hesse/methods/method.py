"""A method of the literature: a named triple curvature × constraint × solver with its usual options."""

from dataclasses import dataclass, fields, replace
from typing import TypeVar, get_args

from pydantic import BaseModel

from hesse.errors import OptionError
from hesse.methods.constraint_options import (
    Basis,
    CodebookOptions,
    ConstraintOptions,
    GridOptions,
    LowRankOptions,
    OutlierOptions,
    SalientOptions,
    SignRankOneOptions,
    SparseOptions,
    TableOptions,
    VectorCodebookOptions,
    parse_sparsity,
)
from hesse.methods.recipe import Recipe, Rewrite, Rule
from hesse.methods.row import Row
from hesse.methods.solver_options import ORDERED, UNDAMPED, SolverOptions

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
        has = {*self.constraints, *self.optional}
        return ConstraintOptions(
            grid=_given(GridOptions, chosen, ("bits", *GRID_OPTIONS)) if "grid" in has and chosen.bits else None,
            table=TableOptions(name=chosen.table, group_size=chosen.group_size or 128)
            if chosen.table is not None
            else None,
            codebook=_given(CodebookOptions, chosen, ("bits",)) if "codebook" in has else None,
            vector_codebook=VectorCodebookOptions(
                bits=chosen.bits or 2, length=chosen.vector_length or 4, books=chosen.books or 1
            )
            if "vector_codebook" in has
            else None,
            sparse=_sparse(chosen) if chosen.sparsity is not None else None,
            low_rank=LowRankOptions(rank=chosen.rank) if chosen.rank is not None else None,
            outliers=OutlierOptions(share=chosen.outliers) if chosen.outliers is not None else None,
            sign_rank_one=SignRankOneOptions() if "sign_rank_one" in has else None,
            salient=SalientOptions() if "salient" in has else None,
            basis=self.basis,
        )

    def _refuse_foreign(self, options: Options) -> None:
        """Raise OptionError for an option that would have no effect in this method."""
        has = {*self.constraints, *self.optional}
        grid = "grid" in has and (options.bits or self.defaults.bits)
        allowed = {
            "bits": bool({"grid", "codebook", "vector_codebook"} & has),
            **dict.fromkeys(GRID_OPTIONS, grid),
            "group_size": grid or "table" in has,
            "sparsity": "sparse" in has,
            "scope": "sparse" in has,
            "block": bool("sparse" in has and (options.sparsity or self.defaults.sparsity)),
            "rank": "low_rank" in has,
            "outliers": "outliers" in has,
            "table": "table" in has,
            **dict.fromkeys(("vector_length", "books"), "vector_codebook" in has),
            "act_order": self.solver in ORDERED,
            "damping": self.solver not in UNDAMPED,
            "input_bits": grid and self.basis == "own",
        }
        if options.bits == 0:
            raise OptionError("bits is 0, but a Grid has 2 to 8")
        for field in fields(options):
            if getattr(options, field.name) is not None and not allowed[field.name]:
                option = "--" + field.name.replace("_", "-")
                reason = "without --bits" if field.name in GRID_OPTIONS and "grid" in has else ""
                meant = f"{option} has no meaning for the method {self.name} {reason}".rstrip()
                raise OptionError(f"{meant}: `hesse methods` shows which has it")


Part = TypeVar("Part", bound=BaseModel)


def _given(kind: type[Part], options: Options, names: tuple[str, ...]) -> Part:
    return kind(**{name: getattr(options, name) for name in names if getattr(options, name) is not None})


def _sparse(options: Options) -> SparseOptions:
    scopes = get_args(SparseOptions.model_fields["scope"].annotation)
    if options.scope is not None and options.scope not in scopes:
        raise OptionError(f"there is no scope {options.scope!r}; there are {', '.join(scopes)}")
    assert options.sparsity is not None
    scope, block = options.scope or "layer", 1 if options.block is None else options.block
    return SparseOptions(amount=options.sparsity, scope=scope, block=block)  # type: ignore[arg-type]


def _damping(value: float) -> float:
    if not 0 <= value <= 1e4:
        raise OptionError(f"damping is {value}, but must be between 0 and 10000; 0.01 is usual")
    return value
