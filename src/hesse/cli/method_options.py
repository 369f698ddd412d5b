"""The options of methods on the command line: one for each that Hesse knows, with its help."""

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_args, get_type_hints

import typer

from hesse.cli.options import METHOD
from hesse.options import KNOWN, Options, flag, help_of, opposite


def with_method_options(run: Callable[..., None]) -> Callable[..., None]:
    """Replace the argument `options` of a command by one option for each that Hesse knows.

    An option that the command has as an argument of its own is left to the command.
    """
    signature = inspect.signature(run)
    hints = get_type_hints(run, include_extras=True)
    own = [option.name for option in KNOWN if option.name not in signature.parameters]

    @functools.wraps(run)
    def command(**arguments: Any) -> None:
        options = Options(**{name: arguments.pop(name) for name in own})
        run(**arguments, options=options)

    parameters = []
    for name, parameter in signature.parameters.items():
        parameters += [_parameter(option) for option in own] if name == "options" else [parameter]
    command.__annotations__ = {p.name: hints.get(p.name, p.annotation) for p in parameters} | {"return": None}
    command.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[p.replace(annotation=command.__annotations__[p.name]) for p in parameters]
    )
    return command


def _parameter(name: str) -> inspect.Parameter:
    """Return the option of one field, which is None if it is not given."""
    kinds = get_args(get_type_hints(Options)[name])
    kind = str if str in kinds else kinds[0]
    flags = [f"{flag(name)}/{opposite(name)}"] if kind is bool else []
    option = typer.Option(*flags, help=help_of(name), rich_help_panel=METHOD)
    annotation = Annotated[kind | None, option]  # type: ignore[valid-type]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
