"""A public name of the package means one thing: classes, functions, types, and constants that other modules import."""

import ast
from collections import defaultdict
from pathlib import Path

import hesse

PACKAGE = Path(hesse.__file__).parent
# Commands bear the names of the functions that they call; kernels those of the loops that they replace on a GPU; the
# worker and the remote code run without this package.
APART = ("cli/", "solvers/sweeps/kernels/", "formats/remote/", "runtimes/worker.py")
# The same meaning twice: a verb in memory and on disk; a loop on floats and its counterpart on tables or blocks.
SAME = {"compress", "prune", "descend", "feed_back"}


def module_of(path: Path) -> str:
    return ".".join(("hesse", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


def defined_names(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return {name for name in names if not name.startswith("_")}


def test_no_public_name_has_two_meanings() -> None:
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}
    imported = {
        (node.module, alias.name)
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    homes: dict[str, list[str]] = defaultdict(list)
    for path, tree in trees.items():
        if path.relative_to(PACKAGE).as_posix().startswith(APART):
            continue
        module = module_of(path)
        for name in defined_names(tree):
            if not name.isupper() or (module, name) in imported:
                homes[name].append(module)
    assert {name: modules for name, modules in homes.items() if len(modules) > 1 and name not in SAME} == {}
