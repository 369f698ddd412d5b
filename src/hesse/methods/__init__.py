"""Methods as named triples curvature × constraint × solver, and recipes that assign rules to layers.

Every row of the table is a `Method`; the objects that it names are built when it runs. Other packages add their own:

    from hesse.methods import Method, Options, register, solver

    @solver("halfway")
    def halfway(weight, curvature, constraint):
        return (weight + constraint.nearest(weight)) / 2

    register(Method("half", "identity", ("grid",), "halfway", "ours", "no data", defaults=Options(bits=4)))

A package that names such a module under the entry point group `hesse.methods` adds them for the command line, too.
"""

from hesse.methods.constraint_parts import PARTS, ConstraintPart, constraint
from hesse.methods.curvatures import CURVATURES, LOSS_CURVATURES, CurvatureKind
from hesse.methods.method import Method
from hesse.methods.recipe import Recipe, Rule, load_recipe
from hesse.methods.solver_options import SOLVERS, SolverEntry, SolverOptions, solver
from hesse.methods.table import (
    DEFAULT_METHOD,
    METHOD_FAMILIES,
    METHODS,
    find_method,
    find_methods,
    find_row,
    methods_of,
    register,
)
from hesse.methods.verbs import VERBS, Verb
from hesse.options import Option, Options, parse_settings

__all__ = [
    "CURVATURES",
    "DEFAULT_METHOD",
    "LOSS_CURVATURES",
    "METHODS",
    "METHOD_FAMILIES",
    "PARTS",
    "SOLVERS",
    "VERBS",
    "ConstraintPart",
    "CurvatureKind",
    "Method",
    "Option",
    "Options",
    "Recipe",
    "Rule",
    "SolverEntry",
    "SolverOptions",
    "Verb",
    "constraint",
    "find_method",
    "find_methods",
    "find_row",
    "load_recipe",
    "methods_of",
    "parse_settings",
    "register",
    "solver",
]
