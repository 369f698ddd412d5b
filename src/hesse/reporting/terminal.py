"""Text and tables in the terminal."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from hesse.errors import printable
from hesse.methods import Method
from hesse.result import REPORT_FILE


def shown(text: str, style: str = "") -> Text:
    """Return text, which may come from a model or a file name, as rich shows it without interpreting markup."""
    return Text(printable(text), style=style)


def unwrapped(text: str, style: str = "") -> Text:
    """Return text for one line, however long: a command or a path to copy."""
    return Text(printable(text), style=style, no_wrap=True, overflow="ignore")


def number(value: float | None, digits: int = 4) -> str:
    """Return a number with `digits` significant digits, or a dash for None."""
    return "-" if value is None else f"{value:.{digits}g}"


def size(count: int) -> str:
    """Return a number of bytes with a unit."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count} B"


def text_table(
    title: str | Text, *columns: str | Column, rows: Iterable[Sequence[str | Text]] = (), **settings: Any
) -> Table:
    """Return a table of `rows` with a line below its head, and its title on the left."""
    table = Table(*columns, box=box.SIMPLE_HEAD, title=title, title_justify="left", **settings)
    for row in rows:
        table.add_row(*row)
    return table


def note_lines(notes: list[str]) -> list[Text]:
    """Return the first notes, such as departures from the options; all of them are in the report."""
    if not notes:
        return []
    lines = [
        Text(f"{len(notes)} {'note' if len(notes) == 1 else 'notes'}:", style="bold yellow"),
        *(shown(f"  {note}") for note in notes[:20]),
    ]
    return lines if len(notes) <= 20 else [*lines, Text(f"  and {len(notes) - 20} more in {REPORT_FILE}")]


def methods_table(families: Mapping[str, Sequence[Method]]) -> Table:
    """Return the table of methods as triples by family, each with its source and needs."""
    triple = "curvature × constraint × solver"
    table = text_table(f"method = {triple}", Column("method", no_wrap=True), triple)
    for family, methods in families.items():
        table.add_section()
        table.add_row(f"[bold]{family}[/bold]")
        for method in methods:
            table.add_row(method.name, _triple(method))
    return table


def options_table(method: Method) -> Table:
    """Return the table of a method's options, with defaults and help."""
    columns = Column("option", no_wrap=True), Column("default", no_wrap=True), ""
    rows = [[escape(text) for text in (each.name, each.default_text, each.help)] for each in method.options()]
    return text_table(f"options of {method.name}", *columns, rows=rows)


def _triple(method: Method) -> str:
    run = "" if method.verb == "compress" else f"; {escape(method.example)}"
    before = "" if method.rewrite is None else f"{method.rewrite}, then "
    below = f"[dim]{escape(method.source)}; needs {escape(method.needs)}{run}[/dim]"
    return f"{before}{' × '.join(method.triple)}\n{below}"


def percent(share: float) -> str:
    """Return a share as a percentage."""
    return f"{100 * share:.3g} %"
