"""Write the pages of the documentation that are made from the table of methods.

Run `python scripts/write_method_pages.py` after a change of a row; tests/test_docs.py compares.
"""

from collections import defaultdict
from pathlib import Path

from hesse.methods import Method, find_methods, methods_of
from hesse.options import KNOWN, Option, opposite

DOCS = Path(__file__).parent.parent / "docs"
BEGIN, END = "<!-- made by scripts/write_method_pages.py -->", "<!-- end -->"
FLAGS = {option.name for option in KNOWN}  # of `hesse compress`; those of other packages go by --set
HEAD = """# Every method and its options

Made from the table that `hesse methods` prints. `hesse methods NAME` shows one row with its options. An option whose
default is - has no effect until it is given. Python takes them as `hesse.Options(bits=4)`; the command line as shown.
"""


def guide_table() -> str:
    """Return the options of the methods that `hesse compress` runs; methods with the same options share a row."""
    rows: dict[str, list[str]] = defaultdict(list)
    for name, method in methods_of("compress").items():
        rows[_usual(method)].append(name)
    lines = ["| method | options and defaults |", "|---|---|"]
    for options, names in rows.items():
        lines.append(f"| {', '.join(f'`{name}`' for name in names)} | {options or 'none'} |")
    return "\n".join(lines)


def options_page() -> str:
    """Return the page that lists each method with what it is built from, how it runs and its options."""
    parts = [HEAD]
    for family, methods in find_methods(()).items():
        parts.append(f"## {family}\n")
        parts += [_section(method) for method in methods]
    return "\n".join(parts).rstrip() + "\n"


def with_table(page: str, table: str) -> str:
    """Return a page with the table between its markers replaced."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def _section(method: Method) -> str:
    curvature, constraint, solver = method.triple
    lines = [
        f"### {method.name}\n",
        f"`{curvature}` × `{constraint}` × `{solver}`. Source: {method.source}. Needs {method.needs}.\n",
        f"    {method.example}\n",
    ]
    if method.rewrite is not None:
        lines.insert(1, f"Rewrites the model first: `{method.rewrite}`.\n")
    if options := method.options():
        on_command_line = method.example.startswith("hesse compress")
        lines += ["| option | default | meaning |", "|---|---|---|"]
        lines += [
            f"| {_flag(option) if on_command_line else f'`{option.name}`'} | {option.default_text} | {option.help} |"
            for option in options
        ]
        lines.append("")
    return "\n".join(lines)


def _usual(method: Method) -> str:
    """Return a method's options with their defaults, and its options that have no effect unless given."""
    usual = [f"`{_given(option)}`" for option in method.options() if option.default is not None]
    more = [f"`{option.flag}`" for option in method.options() if option.default is None and option.name in FLAGS]
    return " ".join(usual) + (f"; also {' '.join(more)}" if more else "")


def _given(option: Option) -> str:
    if option.name not in FLAGS:
        return f"--set {option.name}={option.default_text}"
    if isinstance(option.default, bool):
        return option.flag if option.default else opposite(option.name)
    return f"{option.flag} {option.default_text}"


def _flag(option: Option) -> str:
    off = f"/{opposite(option.name)}" if option.type == "bool" else ""
    return f"`{option.flag}{off}`" if option.name in FLAGS else f"`--set {option.name}=`"


def main() -> None:
    guide = DOCS / "guide.md"
    guide.write_text(with_table(guide.read_text(encoding="utf-8"), guide_table()), encoding="utf-8")
    (DOCS / "methods" / "options.md").write_text(options_page(), encoding="utf-8")


if __name__ == "__main__":
    main()
