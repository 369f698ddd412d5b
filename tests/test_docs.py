"""The Python in the documentation runs."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"


STRUCTURES = sorted(f"curvatures/{path.name}" for path in (DOCS / "curvatures").glob("*.md"))
METHODS = [f"methods/{name}.md" for name in ("networks", "structured", "training")]


@pytest.mark.parametrize("page", ["concepts.md", "curvature.md", "modules.md", *METHODS, *STRUCTURES])
def test_examples_of_plain_tensors_run(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec"), {})
    assert capsys.readouterr().out
