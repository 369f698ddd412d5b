"""Hesse beside its peers: the same model, the same calibration tokens, the same bits, one table.

    make bench        or        python bench/run.py [--peers llmcompressor,autoround,gptqmodel] [--repeats 3]
    python bench/run.py --model FOLDER --only " bit," --without "nearest"      another model, made by train_models.py

Each peer runs in a virtual environment of its own, made from `bench/peers/requirements-*.txt` on the first run. All
checkpoints are evaluated by `hesse.evaluate` on the held-out text, in float32. Results go to `bench/results.json`, of
another model to `bench/results-NAME.json`, and, as tables with ratios, to `docs/benchmarks.md`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from environments import peer_python
from machine import limits
from table import markdown

import hesse
from hesse.checkpoints.checkpoint import read_json
from hesse.checkpoints.locate import DEFAULT_FOLDER
from hesse.data import read_samples

HERE = Path(__file__).resolve().parent
SAMPLES, LENGTH = 128, 256
ONLY_ROUNDING_ROWS = (
    "autoround",
    "gptqmodel",
)  # they do not prune, and their rounding is the point; run once, for time
PLAIN = "hesse, gptq"  # beside the default method
ONE_SAMPLE = "llmcompressor, 1 sample a batch"  # its default; beside it, it gets 32, to be fast


@dataclass(frozen=True)
class Case:
    """One row: what is asked of every program."""

    name: str
    method: str  # hesse's name for it
    peer_method: str
    bits: int | None = None
    group_size: int | None = None
    sparsity: str | None = None


CASES = (
    Case("4 bit, group 64, round to nearest", "rtn", "rtn", 4, 64),
    Case("3 bit, group 64, round to nearest", "rtn", "rtn", 3, 64),
    Case("4 bit, group 64", "kronecker", "gptq", 4, 64),
    Case("3 bit, group 64", "kronecker", "gptq", 3, 64),
    Case("2 bit, group 32", "kronecker", "gptq", 2, 32),
    Case("50 %, SparseGPT", "sparsegpt", "sparsegpt", sparsity="0.5"),
    Case("2:4, SparseGPT", "sparsegpt", "sparsegpt", sparsity="2:4"),
)


def run_peer(peer: str, case: Case, model: Path, ids: Path, out: Path, limit: float | None = None) -> dict[str, Any]:
    """Run a peer's script, for at most `limit` seconds; its last line is its own account."""
    batch = ["--batch-size", "1"] if peer == ONE_SAMPLE else []
    peer = peer.partition(",")[0]
    method = "autoround" if peer == "autoround" else case.peer_method
    command = [str(peer_python(peer)), str(HERE / "peers" / f"run_{peer}.py")]
    command += ["--model", str(model), "--ids", str(ids), "--out", str(out), "--method", method, *batch]
    for option, value in (("--bits", case.bits), ("--group-size", case.group_size), ("--sparsity", case.sparsity)):
        command += [option, str(value)] if value is not None else []
    try:  # some write logs into the present folder
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=out.parent, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"error": f"not finished after {limit:.0f} seconds"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1][:300]}
    account: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return account


def run_hesse(method: str, case: Case, model: Path, ids: Path, out: Path) -> dict[str, Any]:
    """Run the command line in a process of its own, as a person would."""
    command = [sys.executable, "-m", "hesse", "compress", str(model), str(out), "--json", "--data", str(ids)]
    command += ["--method", method]
    for option, value in (("--bits", case.bits), ("--group-size", case.group_size), ("--sparsity", case.sparsity)):
        command += [option, str(value)] if value is not None else []
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    phases = {"rtn": ("solve",), "kronecker": ("probe", "calibrate", "estimate", "solve")}
    phases_of_method = phases.get(method, ("calibrate", "estimate", "solve"))
    return {
        "seconds": sum(report["seconds"].get(phase, 0.0) for phase in phases_of_method),
        "seconds_with_io": report["seconds"]["total"],
        "phases": report["seconds"],
        "peak_rss_bytes": report["peak_rss_bytes"],
        "predicted": report["loss"]["predicted"],
        "version": hesse.__version__,
    }


def measure(
    case: Case, programs: list[str], model: Path, ids: Path, held_out: Path | None, repeats: int
) -> list[dict[str, Any]]:
    """One row for each program: the fastest of its runs, and the quality of its last checkpoint.

    The programs take turns, so that a machine that changes its clock does so for all of them.
    """
    best: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for repeat in range(repeats):
            for program in programs:
                if (repeat and program in ONLY_ROUNDING_ROWS) or "error" in best.get(program, {}):
                    continue
                out = Path(scratch) / program / str(repeat)
                out.parent.mkdir(exist_ok=True)
                own = {"hesse": case.method, PLAIN: "gptq"}
                runner = partial(run_hesse, own[program]) if program in own else partial(run_peer, program)
                account = runner(case, model, ids, out)
                if "error" not in account:
                    evaluate = partial(hesse.evaluate, out, reference=model, length=LENGTH)
                    account |= {f"eval_{k}": v for k, v in asdict(evaluate(data=held_out, samples=SAMPLES)).items()}
                    account["calibration_kl"] = evaluate(data=ids).kl
                if program not in best or account.get("seconds", 0) < best[program]["seconds"]:
                    best[program] = account
    return [{"case": case.name, "program": program, **best[program]} for program in programs]


def _programs(case: Case, peers: list[str], shipped: bool) -> list[str]:
    """Who takes part in a row."""
    rounding = case.method == "kronecker"
    programs = ["hesse", *([PLAIN] if rounding else [])]
    programs += [p for p in peers if p and (rounding or p not in ONLY_ROUNDING_ROWS)]
    calibrated = case.method != "rtn"
    return [*programs, ONE_SAMPLE] if shipped and calibrated and "llmcompressor" in peers else programs


def main() -> None:
    """Run every case for every program, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default="llmcompressor,autoround,gptqmodel")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help="run the rows with this in their name, and keep the others")
    parser.add_argument("--without", default="nothing", help="leave out the rows with this in their name")
    parser.add_argument("--untimed", action="store_true", help="other work disturbs the machine: show no seconds")
    parser.add_argument("--model", type=Path, default=DEFAULT_FOLDER, help="a folder that train_models.py made")
    arguments = parser.parse_args()
    model = arguments.model.resolve()
    shipped = model == DEFAULT_FOLDER.resolve()
    place = HERE / ("results.json" if shipped else f"results-{model.name}.json")
    calibration, held_out = (None, None) if shipped else (model / "calibration.txt", model / "held_out.txt")
    samples, _ = read_samples(
        calibration, model, count=SAMPLES, length=LENGTH, seed=0, purpose="calibration", limit=None
    )
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        ids = Path(scratch) / "calibration.jsonl"
        ids.write_text("".join(json.dumps({"input_ids": sample.tolist()}) + "\n" for sample in samples.ids))
        machine = limits()
        kept = json.loads(place.read_text())["rows"] if arguments.only and place.exists() else []
        kept = [{**row, "earlier": True} for row in kept]
        for case in CASES:
            if arguments.only not in case.name or arguments.without in case.name:
                rows += [row for row in kept if row["case"] == case.name]
                continue
            programs = _programs(case, arguments.peers.split(","), shipped)
            for row in measure(case, programs, model, ids, held_out, arguments.repeats):
                rows.append({**row, "timed": not arguments.untimed})
                print(json.dumps({k: v for k, v in row.items() if k != "phases"}), flush=True)
            rows += [row for row in kept if row["case"] == case.name and row["program"] not in programs]
    facts = read_json(model / "training.json")
    results = {"machine": machine, "model": {"name": model.name, **facts}, "samples": SAMPLES, "length": LENGTH}
    place.write_text(json.dumps({**results, "repeats": arguments.repeats, "rows": rows}, indent=2) + "\n")
    every = [json.loads(path.read_text()) for path in (HERE / "results.json", *sorted(HERE.glob("results-*.json")))]
    (HERE.parent / "docs" / "benchmarks.md").write_text(markdown(every, DEFAULT_FOLDER))


if __name__ == "__main__":
    main()
