"""Write the list of public names in docs/reference.md, from which mkdocstrings renders their docstrings.

Run `python scripts/write_reference.py` after a change of a public name; tests/test_docs.py compares.
"""

import inspect
from importlib import import_module
from pathlib import Path
from typing import get_origin

import hesse
from hesse.result import Result

PAGE = Path(__file__).parent.parent / "docs" / "reference.md"
BEGIN, END = "<!-- made by scripts/write_reference.py -->", "<!-- end -->"
# By heading. Of a package the page lists the names of its __all__, of another module all that it defines; the verbs are
# the functions of `hesse` that return a Result.
SECTIONS = {
    "Verbs": (),
    "Results and reports": (
        "result",
        "jobs.report",
        "jobs.repair_report",
        "jobs.rotate.RotationReport",
        "jobs.estimate.EstimateReport",
        "jobs.blocks_report",
        "jobs.prune_hidden.HiddenReport",
        "modules.report",
        "modules.prune_report",
        "modules.gradual.GradualReport",
        "layerwise.layer_report",
        "planning.budget.PlanReport",
        "evaluation.evaluate.EvaluationReport",
        "evaluation.measurements",
        "inspection.inspect.Inspection",
        "reporting",
    ),
    "Curvature": ("curvature",),
    "Constraints": ("constraints",),
    "Solvers": ("solvers",),
    "Estimation": ("estimation",),
    "Partitions and scores": ("partitions", "scores"),
    "Training": ("training", "training.half_space"),
    "Methods and recipes": ("methods", "methods.recipe", "planning"),
    "Laws": ("testing",),
    "Runtimes": ("runtimes.export_report", "runtimes.benchmark_result", "runtimes.torchao_folder.load_torchao"),
    "Errors": ("errors",),
}


def verbs() -> list[str]:
    """Return the full names of the verbs."""
    entries = [getattr(hesse, name) for name in hesse.HOMES]
    functions = [entry for entry in entries if inspect.isfunction(entry)]
    returning = [f for f in functions if get_origin(inspect.signature(f).return_annotation) is Result]
    return [f"{f.__module__}.{f.__qualname__}" for f in returning]


def reference() -> str:
    """Return the sections of the page."""
    apart = {f"hesse.{name}" for names in SECTIONS.values() for name in names} | set(verbs())
    blocks = []
    for heading, names in SECTIONS.items():
        blocks.append(f"## {heading}")
        blocks += [f"::: hesse.{name}{_members(name, apart)}" for name in names] or [f"::: {verb}" for verb in verbs()]
    return "\n\n".join(blocks)


def with_reference(page: str) -> str:
    """Return a page with the sections between its markers replaced."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{reference()}\n\n{END}{after}"


def _members(name: str, apart: set[str]) -> str:
    """Return the option that lists the members of a package, except those that have a place of their own."""
    package = None if "." in name else import_module(f"hesse.{name}")
    homes = {member: getattr(getattr(package, member), "__module__", "") for member in getattr(package, "__all__", ())}
    own = [member for member, home in homes.items() if not {home, f"{home}.{member}"} & apart]
    return "".join(["\n    options:\n      members:", *(f"\n        - {member}" for member in own)]) if own else ""


def main() -> None:
    PAGE.write_text(with_reference(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
