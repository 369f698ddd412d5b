"""Conformance of Hesse with every model type of transformers that takes token ids, on tiny random models.

    python bench/zoo.py run [--only PATTERN] [--group causal|image-text|seq2seq|base] [--redo] [--workers 2]
    python bench/zoo.py table

A cell is one type: its tiny model is compressed with `rtn`, 8 bits, groups of 16, and OUT is loaded by plain
transformers in another process. It works if no key is missing, unexpected or mismatched, if the outputs equal those of
what Hesse reads of OUT, and if at most 5 % of the language model's linear weights are dense, each of them listed in the
report. Results are kept in bench/zoo.json after each cell, and a second run goes on where the first stopped.
"""

import argparse
import fnmatch
import json
import multiprocessing
import os
import platform
import subprocess
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}

import torch
import zoo_cell
import zoo_models

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "zoo.json"


def cells(group: str | None, only: str) -> list[str]:
    """The cells of a group, or of all, whose `group/type` or type fits a pattern."""
    every = [f"{name}/{model_type}" for name, types in zoo_models.groups().items() for model_type in types]
    chosen = (cell for cell in every if group in (None, cell.split("/")[0]))
    return [cell for cell in chosen if fnmatch.fnmatch(cell, only) or fnmatch.fnmatch(cell.split("/")[1], only)]


def commit() -> str:
    """The commit of the code that is tried."""
    asked = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True)
    return asked.stdout.strip() or "unknown"


def measure(cell: str, answer: Path, seconds: float) -> None:
    """Run a cell in a temporary folder and write its result."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = zoo_cell.run_cell(*cell.split("/"), Path(folder), seconds)
    answer.write_text(json.dumps({**found, "seconds": round(time.monotonic() - start, 1)}))


def run(chosen: list[str], results: Path, workers: int, seconds: float) -> dict[str, Any]:
    """Run cells, `workers` at a time, and keep each result as it comes."""
    torch.set_num_threads(1)
    state = json.loads(results.read_text()) if results.exists() else {"cells": {}}
    packages = {name: version(name) for name in ("torch", "transformers", "compressed-tensors")}
    processor = torch.cpu.get_capabilities().get("cpu_name", platform.processor())
    machine = {"processor": processor, "python": platform.python_version(), "system": platform.system()}
    state |= {"machine": machine, "packages": packages, "commit": commit()}
    context = multiprocessing.get_context("fork")
    running: dict[str, tuple[Any, Path]] = {}
    with tempfile.TemporaryDirectory() as folder:
        waiting = list(reversed(chosen))
        while waiting or running:
            while waiting and len(running) < workers:
                cell = waiting.pop()
                answer = Path(folder, cell.replace("/", " "))
                process = context.Process(target=measure, args=(cell, answer, seconds))
                process.start()
                running[cell] = process, answer
            time.sleep(0.05)
            for cell, (process, answer) in list(running.items()):
                if process.is_alive():
                    continue
                process.join()
                del running[cell]
                found = (
                    json.loads(answer.read_text()) if answer.exists() else {"verdict": zoo_cell.UNBUILT, "detail": ""}
                )
                state["cells"][cell] = {**found, "commit": state["commit"]}
                results.write_text(json.dumps(state, indent=1, sort_keys=True) + "\n")
                print(f"{cell}: {found['verdict']}: {found['detail'][:150]}", flush=True)
    return state


def table(state: dict[str, Any]) -> str:
    """The counts by group and verdict, and the types of each verdict, as markdown."""
    counts = Counter((cell.split("/")[0], found["verdict"]) for cell, found in state["cells"].items())
    verdicts = [verdict for verdict in zoo_cell.VERDICTS if verdict != zoo_cell.UNBUILT]
    lines = [f"| group | built | {' | '.join(verdicts)} |", "|---" * (len(verdicts) + 2) + "|"]
    for group in zoo_models.groups():
        of_group = [counts[group, verdict] for verdict in verdicts]
        lines.append(f"| {group} | {sum(of_group)} | {' | '.join(map(str, of_group))} |")
    for verdict in zoo_cell.VERDICTS:
        found = {cell: own for cell, own in sorted(state["cells"].items()) if own["verdict"] == verdict}
        lines += ["", f"## {verdict.capitalize()} ({len(found)})", ""]
        if verdict == zoo_cell.WORKS:
            lines += [", ".join(f"`{cell}`" for cell in found)]
        else:
            lines += [f"- `{cell}`: {_escape(own['detail'])}" for cell, own in found.items() if _worth_a_line(own)]
    return "\n".join(lines)


def _worth_a_line(found: dict[str, Any]) -> bool:
    return not found["detail"].startswith("TypeError: takes no token ids")


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def main() -> None:
    """Run cells, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "table"))
    parser.add_argument("--only", default="*", help="pattern of types, or of group/type")
    parser.add_argument("--group", choices=("causal", "image-text", "seq2seq", "base"))
    parser.add_argument("--redo", action="store_true", help="run cells again that have a result")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--limit", type=float, default=60, help="seconds of one step of a cell")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.action == "table":
        print(table(json.loads(options.results.read_text())))
        return
    known = json.loads(options.results.read_text())["cells"] if options.results.exists() else {}
    chosen = [cell for cell in cells(options.group, options.only) if options.redo or cell not in known]
    run(chosen, options.results, options.workers, options.limit)


if __name__ == "__main__":
    main()
