"""Exact and Kronecker-factored curvatures beside Hesse's peers: the same networks, the same data, one page.

    python bench/curvature_peers.py [--repeats 3] [--only hessian] [--quick]

Every program runs in a process of its own, the peers in virtual environments of their own, which are made from
`bench/peers/requirements-*.txt` on the first run. Results go to `bench/curvature_peers.json` and
`docs/benchmarks-curvature-peers.md`; `--quick`, which sees in a few minutes that all works, writes none.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from curvature_peers_page import page
from environments import HERE, peer_python
from machine import limits
from torch import Tensor

THREADS = 2
HESSIANS = ("hesse", "hesse, keep_graph", "curvlinops", "pyhessian", "pyhessian, one batch", "eigenthings")
ON_THE_LLAMA = ("hesse", "curvlinops", "pyhessian", "eigenthings")


@dataclass(frozen=True)
class Case:
    """One table: what is measured, of which network, for which programs; Hesse's first one is compared with."""

    step: str
    problem: str
    programs: tuple[str, ...]


CASES = (
    Case("ekfac", "llama", ("hesse, per position", "hesse, per sample", "kronfluence")),
    *(Case("hessian", problem, HESSIANS) for problem in ("mlp", "conv")),
    *(Case("hessian", problem, ON_THE_LLAMA) for problem in ("llama_eager", "llama_sdpa")),
    *(Case("trace", problem, HESSIANS) for problem in ("mlp", "conv")),
    *(Case("gauss_newton", problem, ("hesse", "curvlinops")) for problem in ("mlp", "conv")),
    *(Case("diagonal", problem, ("hesse", "backpack")) for problem in ("mlp", "conv")),
)
ONE_LABEL = ("curvlinops", "pyhessian", "eigenthings", "backpack", "nngeometry", "kronfluence")
AGREEMENT = (
    Case("agreement", "small_mlp", ONE_LABEL),
    Case("agreement", "small_conv", ONE_LABEL),
    Case("agreement", "small_tokens", ("curvlinops", "pyhessian", "eigenthings", "kronfluence")),
)


def run(program: str, case: Case, out: Path, quick: bool) -> dict[str, Any]:
    """One process; its account, or the error that it ended with."""
    name, _, variant = program.partition(", ")
    python = Path(sys.executable) if name == "hesse" else peer_python(name)
    command = [str(python), str(HERE / "peers" / f"run_curvature_{name}.py"), "--case", f"{case.step}:{case.problem}"]
    command += ["--variant", variant, "--out", str(out), "--threads", str(THREADS), *(["--quick"] if quick else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=out.parent)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)]
        return {"error": (errors or lines)[-1][:200]}
    account: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return account


def difference(found: Tensor, reference: Tensor) -> float:
    """The largest difference, relative to the largest entry."""
    return float((found.double() - reference.double()).abs().max() / reference.double().abs().max())


def measure(case: Case, repeats: int, quick: bool) -> list[dict[str, Any]]:
    """One row for each program: its fastest run. The programs take turns, so that a change of clock is shared."""
    best: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        outs = {program: Path(scratch) / f"{index}.pt" for index, program in enumerate(case.programs)}
        for _ in range(repeats):
            for program in case.programs:
                if "error" in best.get(program, {}):
                    continue
                account = run(program, case, outs[program], quick)
                if "error" not in account and case.step == "ekfac":
                    stages = ("covariance", "eigendecomposition", "correction")
                    account["seconds"]["total"] = sum(account["seconds"][stage] for stage in stages)
                if program not in best or _whole(account) < _whole(best[program]):
                    best[program] = account
        products = {program: torch.load(out) for program, out in outs.items() if "error" not in best[program]}
    own = products[case.programs[0]].get("product")
    for program, tensors in products.items():
        if own is not None:
            best[program]["difference"] = difference(tensors["product"], own)
    return [{"step": case.step, "problem": case.problem, "program": program, **best[program]} for program in best]


def agree(case: Case) -> list[dict[str, Any]]:
    """One row for each quantity that a peer and Hesse both compute: their difference, the largest over layers."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        outs = {program: Path(scratch) / f"{program}.pt" for program in ("hesse", *case.programs)}
        accounts = {program: run(program, case, out, quick=False) for program, out in outs.items()}
        own = torch.load(outs["hesse"])
        for program in case.programs:
            row = {"problem": case.problem, "program": program}
            if "error" in accounts[program]:
                rows.append({**row, **accounts[program]})
                continue
            largest: dict[str, float] = {}
            for name, tensor in torch.load(outs[program]).items():
                quantity = name.partition("/")[0]
                largest[quantity] = max(largest.get(quantity, 0.0), difference(tensor, own[name]))
            version = accounts[program]["version"]
            rows += [{**row, "version": version, "quantity": q, "difference": d} for q, d in largest.items()]
    return rows


def _whole(account: dict[str, Any]) -> float:
    return sum(account.get("seconds", {}).values())


def main() -> None:
    """Run every case and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help="run the cases with this in STEP:PROBLEM, and keep the others")
    parser.add_argument("--quick", action="store_true", help="small networks, once; nothing is written")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    file = HERE / "curvature_peers.json"
    kept = json.loads(file.read_text()) if arguments.only and file.exists() else {"rows": [], "agreement": []}
    results: dict[str, Any] = {"machine": limits(), "repeats": arguments.repeats, "rows": [], "agreement": []}
    for cases, key in ((CASES, "rows"), (AGREEMENT, "agreement")):
        for case in cases:
            if arguments.only in f"{case.step}:{case.problem}":
                done = measure(case, arguments.repeats, arguments.quick) if key == "rows" else agree(case)
                print(*map(json.dumps, done), sep="\n", flush=True)
            else:
                done = [r for r in kept[key] if r["problem"] == case.problem and r.get("step", case.step) == case.step]
            results[key] += done
    if not arguments.quick:
        file.write_text(json.dumps(results, indent=2) + "\n")
        (HERE.parent / "docs" / "benchmarks-curvature-peers.md").write_text(page(results))


if __name__ == "__main__":
    main()
