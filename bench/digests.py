"""Digests of what every command and method writes and returns: to show that a refactoring changes nothing computed.

    PYTHONPATH=OLD/src python bench/digests.py record OLD.json [--only PATTERN]
    PYTHONPATH=NEW/src python bench/digests.py record NEW.json
    python bench/digests.py compare OLD.json NEW.json

A case's digest is the sha256 of each tensor, config.json without versions and paths, the sha256 of other files, and
each number of what was returned or written as JSON, but for seconds and the memory of the process. Text is left out,
except for errors: their class has to stay, and a changed message is only reported. Results are written after each
case, and a second `record` goes on where the first stopped. Results of two machines differ where their kernels do.
"""

import argparse
import dataclasses
import fnmatch
import hashlib
import json
import os
import platform
import random
import re
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

# Names that changed since OLD was recorded, by regular expressions on whole `case kind:name` lines; None for what was
# dropped on purpose. Names that still match nothing are compared by their values alone.
TOP = r"numbers:(?:0|hesse-report\.json)"  # a report as it is returned, and as it is written
RENAMED: list[tuple[str, str | None]] = [
    (r":sensitivities\.safetensors:", ":output_factors.safetensors:"),
    (
        r"^repair/dense \w+:compression\.json\.",
        None,
    ),  # the compressed model's: was copied
    (r":(compression|narrow|blocks|repair)\.json\.", ":hesse-report.json."),
    (rf"^((?:compress|cut)/\S+ {TOP})\.predicted_loss_increase$", r"\1.loss.predicted"),
    (r"\.verification\.tensors_equal$", ".tensors_equal"),
    (r"\.verification\.", ".loss."),
    (r"\.calibration\.curvature$", ".calibration.statistics"),
    (rf"^((?:narrow|drop-blocks)/\S+ {TOP})\.(measured|standard_error|samples|held_out)$", r"\1.loss.\2"),
    (rf"^(narrow/\S+ {TOP})\.blocks\.", r"\1.layers."),
    (r"^((?:inspect|evaluate)/\S+ numbers:)loss$", r"\1model_loss"),
    (r"^(repair/\S+ numbers:2\.)loss$", r"\1model_loss"),
    (rf"^(export/\S+ {TOP})\.bytes$", r"\1.bytes_after"),
    (rf"^(rotate/\S+ {TOP})\.kl$", r"\1.loss.measured"),
    (rf"^(repair/\S+ {TOP})\.bytes_compressed$", r"\1.bytes_before"),
    (rf"^(repair/\S+ {TOP})\.(predicted|measured|standard_error)_before$", r"\1.loss_before.\2"),
    (rf"^(repair/\S+ {TOP})\.(predicted|measured|standard_error)_after$", r"\1.loss.\2"),
    (rf"^(repair/\S+ {TOP})\.(samples|held_out)$", r"\1.loss.\2"),
    (r"^(drop-blocks/\S+ numbers:\S*)\bdropped\.", r"\1removed."),
    (r"^(drop-blocks/\S+ numbers:\S*)\bshare_rank$", r"\1rank"),
    (r"^prune-module/\S+ numbers:recipe\.update$", None),  # refit, a name
    (r"^((?:prune-groups/\S+|only-train-once) numbers:1\.removed\.)neurons of", r"\1hidden units of"),
]
# Names that NEW has and OLD had not, by regular expressions on the same lines.
ADDED: list[str] = [
    r"(inspect|evaluate)/\S+ numbers:(loss(\.\w+)?|schema|(bytes|parameters)_(before|after)|method)",
    r"repair/\S+ numbers:2\.(loss(\.\w+)?|(bytes|parameters)_(before|after)|method)",
    r"\S+ numbers:(0|hesse-report\.json|statistics\.json)\.(schema|(bytes|parameters)_(before|after)|method|tokens)",
    r"\S+ numbers:(0|hesse-report\.json|statistics\.json)\.loss(_before)?(\.\w+)?",
    r"rotate/\S+ numbers:hesse-report\.json\..*",
    r"prune-module/\S+ numbers:1\.(removed\..*|loss\.(measured|held_out)|settings\.block)",
    r"(prune-groups/\S+|narrow-heads|only-train-once) numbers:1\.(settings\..*|loss\.(measured|held_out))",
]
ERRORS: dict[str, str] = {}  # classes of errors, old to new
REFUSED_NO_MORE: list[str] = []  # patterns of cases that OLD refused and NEW does
CASES_DROPPED: list[str] = []  # patterns of cases that NEW has not, on purpose

KINDS = ("tensors", "config", "files", "numbers")
# Fields that differ from run to run, or from machine to machine.
VOLATILE = re.compile(r"^seconds$|_seconds$|_rss_|^memory$|^disk$|versions?$|path$")


def digest(tensor: Any) -> str:
    """The sha256 of a tensor's bytes, type and shape."""
    import torch

    plain = tensor.detach().cpu().contiguous()
    content = plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""
    return hashlib.sha256(f"{plain.dtype} {tuple(plain.shape)}".encode() + content).hexdigest()[:20]


class Digest:
    """What one case computed."""

    def __init__(self) -> None:
        self.content: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}

    def add(self, value: Any, name: str = "", top: bool = True) -> None:
        """All tensors and numbers of a value, and what is at the paths that a case returns."""
        import torch

        if isinstance(value, Path):
            if top:
                self._add_path(value)
        elif isinstance(value, torch.nn.Module):
            for key, tensor in value.state_dict().items():
                self.content["tensors"][f"{name}.{key}"] = digest(tensor)
        elif isinstance(value, torch.Tensor):
            self.content["tensors"][name] = digest(value)
        elif isinstance(value, bool | int | float) or value is None:
            self.content["numbers"][name] = repr(value)
        else:
            for key, part in _parts(value):
                if not VOLATILE.search(key):
                    self.add(part, f"{name}.{key}" if name else key, top and isinstance(value, tuple | list))

    def _add_path(self, place: Path) -> None:
        files = sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else [place]
        for path in files:
            name = path.relative_to(place).as_posix() if place.is_dir() else "file"
            if path.name == "README.md":
                continue  # a model card, whose figures are the report's
            if path.suffix == ".safetensors":
                self._add_safetensors(path, name)
            elif path.name == "config.json":
                self.content["config"][name] = _sha(
                    json.dumps(_canonical(json.loads(path.read_text())), sort_keys=True)
                )
                self._add_leaves(_canonical(json.loads(path.read_text())), name)
            elif path.suffix == ".json" and path.name not in ("tokenizer.json", "tokenizer_config.json"):
                self.add(json.loads(path.read_text()), name, top=False)
            elif path.read_bytes()[:4] == b"GGUF":
                self._add_gguf(path)
            else:
                self.content["files"][name] = hashlib.sha256(path.read_bytes()).hexdigest()[:20]

    def _add_leaves(self, value: Any, name: str) -> None:
        """A config's own values, which show where two of them differ."""
        if isinstance(value, dict | list):
            for key, part in _parts(value):
                self._add_leaves(part, f"{name}.{key}")
        else:
            self.content["config"][name] = repr(value)

    def _add_safetensors(self, path: Path, name: str) -> None:
        from safetensors import safe_open

        with safe_open(path, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                self.content["tensors"][f"{name}:{key}"] = digest(opened.get_tensor(key))
            for key, text in sorted((opened.metadata() or {}).items()):
                if not VOLATILE.search(key):
                    self.content["files"][f"{name}:metadata.{key}"] = text if len(text) < 80 else _sha(text)

    def _add_gguf(self, path: Path) -> None:
        from gguf import GGUFReader

        reader = GGUFReader(path)
        for tensor in reader.tensors:
            head = f"{tensor.tensor_type} {tensor.shape.tolist()}".encode()
            self.content["tensors"][tensor.name] = hashlib.sha256(head + tensor.data.tobytes()).hexdigest()[:20]
        for key, field in reader.fields.items():
            if key != "general.name" and not VOLATILE.search(key):  # the name is that of a temporary folder
                parts = b"".join(field.parts[place].tobytes() for place in field.data)
                self.content["files"][f"gguf:{key}"] = hashlib.sha256(parts).hexdigest()[:20]


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """What a record, a mapping or a sequence is made of, by name; nothing for all else, such as text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
    elif isinstance(value, Mapping):
        yield from ((str(key), part) for key, part in value.items())
    elif hasattr(value, "_asdict"):
        yield from value._asdict().items()
    elif isinstance(value, tuple | list):
        yield from ((str(place), part) for place, part in enumerate(value))


def _canonical(value: Any) -> Any:
    """JSON without versions and paths."""
    if isinstance(value, dict):
        return {key: _canonical(part) for key, part in value.items() if not re.search(r"version|path", key)}
    return [_canonical(part) for part in value] if isinstance(value, list) else value


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def environment() -> dict[str, Any]:
    """What bits depend on beside the code."""
    import torch
    import transformers

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cpu": (models or [platform.machine()])[0],
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def record(out: Path, only: str) -> int:
    """Run the cases that `out` has not, and write each there; 1 if one stopped on anything but a refusal."""
    import torch

    torch.set_num_threads(1)
    import digest_api
    from digest_cases import CASES

    found = json.loads(out.read_text()) if out.exists() else {"environment": environment(), "cases": {}}
    if found["environment"] != environment():
        print(f"{out} was recorded in another environment: {found['environment']}")
        return 1
    failed, began = 0, time.monotonic()
    for name in (name for name in CASES if fnmatch.fnmatch(name, only) and name not in found["cases"]):
        torch.manual_seed(0)
        random.seed(0)
        start, result = time.monotonic(), Digest()
        with tempfile.TemporaryDirectory(prefix="digests-") as folder:
            try:
                result.add(CASES[name](Path(folder)))
                content: dict[str, Any] = result.content
            except digest_api.HesseError as error:
                content = {"error": [type(error).__name__, str(error).replace(folder, "FOLDER")]}
            except Exception:
                print(f"{name} failed:\n{traceback.format_exc()}", flush=True)
                failed += 1
                continue
        found["cases"][name] = content
        partial = out.with_name(out.name + ".partial")
        partial.write_text(json.dumps(found, indent=1) + "\n")
        partial.replace(out)
        shown = "refused" if "error" in content else ", ".join(f"{len(content[kind])} {kind}" for kind in KINDS)
        print(f"{time.monotonic() - start:6.2f} s  {name}: {shown}", flush=True)
    print(f"{len(found['cases'])} cases in {out}, {failed} failed, {time.monotonic() - began:.0f} s")
    return int(failed > 0)


def differences(case: str, old: dict[str, Any], new: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What differs, and what is worth a word but no difference."""
    if "error" in old or "error" in new:
        before, after = (side.get("error", ["no error", ""]) for side in (old, new))
        if "error" not in new and any(fnmatch.fnmatch(case, pattern) for pattern in REFUSED_NO_MORE):
            return [], ["it is not refused any more"]
        if ERRORS.get(before[0], before[0]) != after[0]:
            return [f"{before[0]} became {after[0]}: {after[1]}"], []
        return [], [] if before[1] == after[1] else [f"message was: {before[1]}", f"message is: {after[1]}"]
    found, words = [], []
    for kind in KINDS:
        before, after = _renamed(case, kind, old[kind]), dict(new[kind])
        for name in sorted(before.keys() & after.keys()):
            if before[name] != after[name]:
                found.append(f"{kind}: {name}: {before[name]} became {after[name]}")
        # An absent field says as much as one that is None.
        lost = {n: v for n, v in before.items() if n not in after and v != "None"}
        added = {n: v for n, v in after.items() if n not in before and v != "None"}
        added = {n: v for n, v in added.items() if not any(re.fullmatch(p, f"{case} {kind}:{n}") for p in ADDED)}
        missing, extra = (Counter(a.values()) - Counter(b.values()) for a, b in ((lost, added), (added, lost)))
        for values, side, word in ((missing, lost, "missing"), (extra, added, "extra")):
            found += [f"{kind}: {word} {name}: {value}" for name, value in side.items() if value in values]
        if lost and not missing and not extra:
            words.append(f"{len(lost)} {kind} have other names and the same values, such as {min(lost)}")
    return found, words


def _renamed(case: str, kind: str, values: dict[str, Any]) -> dict[str, Any]:
    """Old values by their new names."""
    result = {}
    for name, value in values.items():
        line: str | None = f"{case} {kind}:{name}"
        for pattern, into in RENAMED:
            if line is not None and re.search(pattern, line):
                line = None if into is None else re.sub(pattern, into, line)
        if line is not None:
            result[line.removeprefix(f"{case} {kind}:")] = value
    return result


def compare(old: Path, new: Path, only: str, shown: int) -> int:
    """Print for each case whether both are equal; 1 if any is not."""
    before, after = json.loads(old.read_text()), json.loads(new.read_text())
    for key, value in before["environment"].items():
        if after["environment"].get(key) != value:
            print(f"{key} was {value} and is {after['environment'].get(key)}: numbers may differ for that alone")
    cases = [name for name in {**before["cases"], **after["cases"]} if fnmatch.fnmatch(name, only)]
    unequal = 0
    for name in cases:
        if name not in before["cases"]:
            print(f"new      {name}")
            continue
        if name not in after["cases"]:
            dropped = any(fnmatch.fnmatch(name, pattern) for pattern in CASES_DROPPED)
            print(f"{'dropped' if dropped else 'MISSING':8} {name}")
            unequal += not dropped
            continue
        found, words = differences(name, before["cases"][name], after["cases"][name])
        unequal += bool(found)
        print(f"{'DIFFERS' if found else 'equal':8} {name}" + (f": {len(found)} differences" if found else ""))
        for line in [*found[:shown], *words]:
            print(f"           {line}")
    print(f"{len(cases)} cases, {unequal} differ")
    return int(unequal > 0)


def main() -> int:
    """Record or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording, comparing = commands.add_parser("record"), commands.add_parser("compare")
    recording.add_argument("out", type=Path)
    comparing.add_argument("old", type=Path)
    comparing.add_argument("new", type=Path)
    comparing.add_argument("--shown", type=int, default=5, help="differences to print for each case")
    for command in (recording, comparing):
        command.add_argument("--only", default="*", help="a pattern of cases' names, such as 'compress/llama/*'")
    chosen = parser.parse_args()
    if chosen.command == "record":
        return record(chosen.out, chosen.only)
    return compare(chosen.old, chosen.new, chosen.only, chosen.shown)


if __name__ == "__main__":
    sys.exit(main())
