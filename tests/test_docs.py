"""The Python in the documentation runs."""

import re
from pathlib import Path

import pytest
from write_method_pages import guide_table, options_page, with_table
from write_reference import with_reference

import hesse
from hesse.methods import METHODS, find_methods, methods_of

DOCS = Path(__file__).parent.parent / "docs"


STRUCTURES = sorted(f"curvatures/{path.name}" for path in (DOCS / "curvatures").glob("*.md"))
METHOD_PAGES = [f"methods/{name}.md" for name in ("networks", "structured", "training")]


@pytest.mark.parametrize("page", ["concepts.md", "curvature.md", "modules.md", *METHOD_PAGES, *STRUCTURES])
def test_examples_of_plain_tensors_run(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec"), {})
    assert capsys.readouterr().out


def test_every_method_has_its_section_and_its_options() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in (DOCS / "methods").glob("*.md"))
    guide = (DOCS / "guide.md").read_text(encoding="utf-8")
    missing = []
    for row in METHODS:
        name = row.removesuffix("-groups")
        ways = (f"`{name}`", f"`hesse {name} ", f"`hesse.{name.replace('-', '_')}(")  # its name, command or call
        missing += [] if any(way in pages for way in ways) else [row]
    assert missing == []
    assert [name for name in methods_of("compress") if f"`{name}`" not in guide] == []


def test_pages_that_are_made_from_the_table_are_as_it_makes_them() -> None:
    guide = (DOCS / "guide.md").read_text(encoding="utf-8")
    assert guide == with_table(guide, guide_table()), "run scripts/write_method_pages.py"
    assert (DOCS / "methods" / "options.md").read_text(encoding="utf-8") == options_page(), (
        "run scripts/write_method_pages.py"
    )


def test_the_reference_lists_every_public_name() -> None:
    page = (DOCS / "reference.md").read_text(encoding="utf-8")
    assert page == with_reference(page), "run scripts/write_reference.py"
    names = set(re.findall(r"^(?:::: |        - )(?:.*\.)?(\w+)$", page, re.MULTILINE))
    assert set(hesse.__all__) - names == {"__version__"}
    headings = {heading.lower().replace(" ", "-") for heading in re.findall(r"^## (.*)", page, re.MULTILINE)}
    assert set(re.findall(r"\]\(#([\w-]+)\)", page)) <= headings


@pytest.mark.parametrize("page", ["index.md", "structured.md", "networks.md"])
def test_every_method_that_a_page_recommends_is_one_that_the_command_finds(page: str) -> None:
    text = (DOCS / "methods" / page).read_text(encoding="utf-8")
    table = text[text.index("| you ") :].split("\n\n")[0]
    named = re.findall(r'`(?:method=")?([a-z][\w-]*)[^`]*`', "\n".join(row.split("|")[2] for row in table.splitlines()))
    names = [name for name in named if name != "hesse"]
    assert names
    for name in names:
        assert find_methods([name])
