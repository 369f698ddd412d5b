"""Write the pages of the documentation that are made from the table of methods.

Run `python scripts/write_method_pages.py` after a change of a row; tests/test_docs.py compares.
"""

from pathlib import Path

from hesse.reporting.method_pages import guide_table, options_page, with_table

DOCS = Path(__file__).parent.parent / "docs"


def main() -> None:
    guide = DOCS / "guide.md"
    guide.write_text(with_table(guide.read_text(encoding="utf-8"), guide_table()), encoding="utf-8")
    (DOCS / "methods" / "options.md").write_text(options_page(), encoding="utf-8")


if __name__ == "__main__":
    main()
