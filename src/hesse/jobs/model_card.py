"""Model card: README.md of a written model folder, with the metadata that the hub reads."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from hesse.checkpoints.files import belongs
from hesse.checkpoints.locate import DEFAULT, HUB_ID
from hesse.data.sources import is_dataset_id, source_names
from hesse.result import Report

CARD_FILE = "README.md"
INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")  # from the base model's card
LARGEST_CARD = 1 << 20  # bytes of a base's card that are read
LONGEST_VALUE, MOST_VALUES = 200, 100
MOST_SCHEMES = 5  # distinct ones that a card lists
SNAPSHOT = re.compile(r"models--(.+?)--(.+)")  # a model's folder in the hub's cache
TAG = "hesse"
VERBS = {"compress": "compressed", "prune": "pruned", "repair": "repaired", "rotate": "rotated"}


def model_card(report: Report, base: Path, config: dict[str, Any], data: object, code: bool = False) -> str:
    """Return the card of a model that was made from the model in the folder `base`.

    Args:
        report: the report of the command.
        base: the base model's folder, whose card gives the license, language and task.
        config: config.json of the result.
        data: the calibration data as the user gave them.
        code: True if the result needs the modeling file in its folder.
    """
    inherited = read_metadata(base)
    name = base_model_id(report.model, base, inherited)
    quantized = "quantization_config" in config
    metadata: dict[str, Any] = {} if name is None else {"base_model": name}
    if name is not None and quantized:
        metadata["base_model_relation"] = "quantized"
    metadata["library_name"] = "transformers"
    metadata |= {key: inherited[key] for key in INHERITED if key in inherited}
    names = source_names(data) if isinstance(data, str) else []
    if ids := [each.split(":")[0] for each in names if is_dataset_id(each)]:
        metadata["datasets"] = ids
    metadata["tags"] = [TAG, report.verb, *([str(config["quantization_config"]["quant_method"])] if quantized else [])]
    front = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n\n{_text(report, name or _plain_name(report.model), config, code)}"


def base_model_id(given: str, folder: Path, metadata: dict[str, Any]) -> str | None:
    """Return the hub id of the base model: as given, from the hub's cache, or from the card of an earlier command."""
    if not Path(given).exists() and HUB_ID.fullmatch(given):
        return given
    cached = SNAPSHOT.fullmatch(folder.resolve().parent.parent.name)
    if cached is not None and folder.resolve().parent.name == "snapshots":
        return f"{cached[1]}/{cached[2]}"
    earlier = metadata.get("base_model")
    if TAG in metadata.get("tags", ()) and isinstance(earlier, str) and HUB_ID.fullmatch(earlier):
        return earlier
    return None


def read_metadata(folder: Path) -> dict[str, Any]:
    """Return the texts and lists of texts in the front matter of a model folder's card; nothing if there is no card."""
    path = folder / CARD_FILE
    if not path.is_file() or not belongs(path, folder):
        return {}
    with path.open("rb") as file:
        text = file.read(LARGEST_CARD).decode("utf-8-sig", errors="replace")
    found = re.match(r"\s*---\r?\n(.*?)\r?\n---\s*(\r?\n|$)", text, re.DOTALL)
    if found is None:
        return {}
    try:
        content = yaml.load(found[1], yaml.BaseLoader)  # all values are texts: `license: no` is no boolean
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return {key: value for key, value in content.items() if _is_plain(value)} if isinstance(content, dict) else {}


def _is_plain(value: object) -> bool:
    values = value if isinstance(value, list) else [value]
    return 0 < len(values) <= MOST_VALUES and all(
        isinstance(each, str) and 0 < len(each) <= LONGEST_VALUE and each.isprintable() for each in values
    )


def _plain_name(model: str) -> str:
    """Return a model's name without the folders above it, which are the user's own."""
    return "the model shipped with Hesse" if model == DEFAULT else Path(model).name


def _text(report: Report, base: str, config: dict[str, Any], code: bool) -> str:
    loss = report.loss
    rows = [("method", report.method), ("scheme", _scheme(report))]
    calibration = getattr(report, "calibration", None)
    if calibration is not None:
        parts = str(calibration["source"]).split(", ")
        source = ", ".join(part if is_dataset_id(part) or "/" not in part else Path(part).name for part in parts)
        rows.append(("calibration", f"{calibration['samples']} samples of {calibration['length']} tokens: {source}"))
    for label, before, after in (
        ("bytes of weights", report.bytes_before, report.bytes_after),
        ("parameters", report.parameters_before, report.parameters_after),
    ):
        if after is not None:
            rows.append((label, f"{after:,}" if before is None else f"{after:,}, from {before:,}"))
    if (bits := getattr(report, "bits_per_weight", None)) is not None:
        rows.append(("bits per weight, compressed layers", f"{bits:.4g}"))
    if loss is not None and loss.predicted is not None:
        rows.append((f"loss increase predicted, {loss.unit}", f"{loss.predicted:.4g}"))
    if loss is not None and loss.measured is not None:
        error = "" if loss.standard_error is None else f" ± {loss.standard_error:.1g}"
        where = f", {loss.samples} {'held-out' if loss.held_out else 'calibration'} samples" if loss.samples else ""
        rows.append((f"{loss.name} measured{where}", f"{loss.measured:.4g}{error}"))
    table = "\n".join(f"| {_cell(label)} | {_cell(value)} |" for label, value in rows if value)
    extra = ", trust_remote_code=True" if code else ""
    kind = "AutoModelForCausalLM" if "CausalLM" in str(config.get("architectures")) else "AutoModel"
    packages = "transformers compressed-tensors" if "quantization_config" in config else "transformers"
    verb = VERBS.get(report.verb, report.verb)
    return (
        f"# {_cell(base)}, {verb} by Hesse\n\n"
        f"{_cell(base)} was {verb} with `hesse {report.verb}`, version {report.versions.get('hesse', 'unknown')}. "
        "The losses are differences from the base model; all figures are in `hesse-report.json`.\n\n"
        f"| | |\n|---|---|\n{table}\n\n"
        f"## Load\n\n    pip install {packages}\n\n```python\nfrom transformers import {kind}\n\n"
        f'model = {kind}.from_pretrained("FOLDER_OR_HUB_ID"{extra})\n```\n'
    )


def _scheme(report: Report) -> str | None:
    """Return the distinct methods of the layers (curvature × constraint × solver), and the constraints' options."""
    methods = dict.fromkeys(str(layer.method) for layer in report.layers if hasattr(layer, "method"))
    rules = getattr(report, "recipe", {}).get("rules", ())
    options = dict.fromkeys(_options(rule["constraint"]) for rule in rules)
    parts = [_first(methods), _first(options)]
    return ": ".join(part for part in parts if part) or None


def _options(constraint: dict[str, Any]) -> str:
    """Return a constraint of a recipe as text, such as `grid (bits 4, group_size 128)`."""
    parts = []
    for name, options in constraint.items():
        if isinstance(options, dict):
            parts.append(f"{name} ({', '.join(f'{key} {value}' for key, value in options.items())})")
        else:
            parts.append(f"{name} {options}")
    return " + ".join(parts)


def _first(texts: Iterable[str]) -> str:
    """Return the first few texts on one line."""
    every = list(texts)
    return "; ".join([*every[:MOST_SCHEMES], *(["..."] if len(every) > MOST_SCHEMES else [])])


def _cell(text: object) -> str:
    """Return text as a cell of a Markdown table shows it, without markup that could end the cell."""
    plain = "".join(character if character.isprintable() else " " for character in str(text))
    return plain.replace("|", "\\|").replace("<", "&lt;")
