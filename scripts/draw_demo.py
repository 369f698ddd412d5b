"""Draw the table that `hesse demo` prints: python scripts/draw_demo.py docs/demo.svg."""

import argparse
import tempfile
from pathlib import Path

from rich.console import Console

import hesse
from hesse.reporting import cost_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("picture", type=Path)
    picture: Path = parser.parse_args().picture
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        report = hesse.compress("default", out, options=hesse.Options(bits=4, group_size=64)).report
        after, before = hesse.evaluate(out, reference="default").report, hesse.evaluate("default").report
    console = Console(record=True, width=92)
    console.print(cost_table(report, before, after))
    console.save_svg(str(picture), title="make demo")


if __name__ == "__main__":
    main()
