"""Find the sources that data names: files, folders, data sets, mixtures of them, and the text shipped with Hesse."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hesse.checkpoints.locate import DEFAULT, DEFAULT_FOLDER
from hesse.data.readers import (
    FILE_TYPES,
    INSTALL,
    READERS,
    Records,
    check_columns,
    chosen_columns,
    file_type,
    read_records,
)
from hesse.data.records import COLUMNS, Content, TokenRecord
from hesse.errors import DataError, reason

Purpose = Literal["calibration", "evaluation"]
TokenData = Sequence[Sequence[int] | Mapping[str, Any]]  # token ids, or records with `input_ids`
# The text shipped with the package: its name in messages, and its file in `DEFAULT_FOLDER`.
SHIPPED = {
    "calibration": ("default calibration text", "calibration.txt"),
    "evaluation": ("default held-out text", "held_out.txt"),
}
# The split of a data set id that names none: evaluation must not use calibration data.
SPLITS = {"calibration": "train", "evaluation": "test"}
DATASET_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(:[^:]*(:.*)?)?")
LEAST_WEIGHT = 1e-6
WEIGHT = re.compile(r":([0-9.]+(?:[eE][+-]?[0-9]+)?|[+-]?(?:nan|inf)|-[0-9.]+)$")


@dataclass(frozen=True)
class Source:
    """One source of samples."""

    name: str  # as the user gave it
    content: Content
    weight: float = 1.0  # in a mixture, relative to the other sources


def read_sources(data: str | Path | TokenData | None, purpose: Purpose) -> list[Source]:
    """Read all sources that `data` names.

    Raises:
        DataError: a source is missing, empty, damaged or of an unknown type.
    """
    if data is None or isinstance(data, str | Path):
        return [Source(*_read_source(name, purpose), weight) for name, weight in _weighted(data)]
    if not data:
        raise DataError("the list of token ids is empty: give at least one list of token ids")
    source = "the token ids given"
    places = [f"{source}, sample {number}" for number in range(1, len(data) + 1)]
    if all(isinstance(entry, Mapping) for entry in data):
        return [Source(source, Content.of(zip(places, data, strict=True)))]
    return [Source(source, Content(samples=list(map(TokenRecord, places, data))))]


def source_names(data: str) -> list[str]:
    """Return the names of all sources in `data`, without weights."""
    return [str(name) for name, _ in _weighted(data)]


def data_files(data: str | Path | None) -> list[Path]:
    """Return the local files that `data` names, in the order in which they are read."""
    files: list[Path] = []
    for name, _ in _weighted(data):
        path = None if name is None or name == DEFAULT else Path(os.path.expanduser(name))
        if path is not None and os.path.exists(path):
            files += _files_in(path)[0] if path.is_dir() else [path]
    return files


def _weighted(data: str | Path | None) -> list[tuple[str | Path | None, float]]:
    """Return the names in `data` with their weights: those of a mixture, if it is one."""
    if not isinstance(data, str) or "," not in data or os.path.exists(os.path.expanduser(data)):
        return [(data, 1.0)]
    sources: dict[str, float] = {}
    for part in data.split(","):
        found = WEIGHT.search(part.strip())
        name = part.strip()[: None if found is None else found.start()]
        if not name:
            raise DataError(f"the mixture {data} has a part without a name: write a.jsonl,b.jsonl:0.3")
        if name in sources:
            raise DataError(f"the mixture {data} names {name} twice: name it once, with the sum of its weights")
        try:
            weight = 1.0 if found is None else float(found[1])
        except ValueError:
            weight = math.nan
        if not LEAST_WEIGHT <= weight <= 1 / LEAST_WEIGHT:
            raise DataError(
                f"the mixture {data}: the weight of {name} is not from {LEAST_WEIGHT:g} to {1 / LEAST_WEIGHT:g}: "
                "correct it"
            )
        sources[name] = weight
    return list(sources.items())


def _read_source(data: str | Path | None, purpose: Purpose) -> tuple[str, Content]:
    if data is None or (isinstance(data, str) and data == DEFAULT):
        source, name = SHIPPED[purpose]
        path = DEFAULT_FOLDER / name
        if not path.is_file():
            raise DataError(
                f"the {source} is missing from this installation ({path}): install Hesse again, or give a file"
            )
        return source, _read_path(path)
    # os.path, because Path raises on an unknown ~user and on a name too long for the file system.
    path = Path(os.path.expanduser(data))
    if is_dataset_id(data):
        return str(data), dataset_content(str(data), purpose)
    return str(data), _read_path(path)


def is_dataset_id(data: str | Path) -> bool:
    """True if `data` has the form of a data set id, and no such file exists."""
    if not isinstance(data, str) or os.path.exists(os.path.expanduser(data)):
        return False
    return DATASET_ID.fullmatch(data) is not None and file_type(Path(data)) not in READERS


def _read_path(path: Path) -> Content:
    if not os.path.exists(path):
        raise DataError(
            f"{path} does not exist: give {FILE_TYPES}, a folder of them, a data set id such as owner/name, or "
            "`default`"
        )
    if path.is_dir():
        return _read_folder(path)
    if file_type(path) not in READERS:
        raise DataError(f"{path} has the extension {path.suffix or '(none)'}: give {FILE_TYPES}")
    content = Content.of(read_records(path))
    if content.empty:
        raise DataError(f"{path} is empty: give a file with text in it")
    return content


def _files_in(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the data files in a folder and the folders in it, sorted, and the other files; hidden ones are neither."""
    try:
        found = sorted(path for path in folder.rglob("*") if path.is_file())
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {reason(error)}") from None
    seen = [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    return [path for path in seen if file_type(path) in READERS], [
        path for path in seen if file_type(path) not in READERS
    ]


def _read_folder(folder: Path) -> Content:
    files, others = _files_in(folder)
    if not files:
        raise DataError(f"{folder} is a folder without data files: give a folder with {FILE_TYPES}, or a file")

    def records() -> Records:
        for path in files:
            yield from read_records(path)

    content = Content.of(records())
    if content.empty:
        raise DataError(f"the files in {folder} are empty: give a folder with text in it")
    if others:
        names = ", ".join(str(path.relative_to(folder)) for path in others[:3])
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        content.notes.append(f"{folder}: {len(files)} files are read, and not {names}{more}, of other types")
    return content


def dataset_content(name: str, purpose: Purpose) -> Content:
    """Return the rows of a data set `owner/name[:config[:split]]`, which the library downloads if it must.

    Raises:
        DataError: it cannot be loaded, or has no text, chats or token ids.
    """
    try:
        import datasets  # imported late: optional, and it takes a second
    except ImportError:
        raise DataError(f"{name} is not a file here, and for a data set id the package datasets {INSTALL}") from None
    repository, config, split = (*name.split(":", 2), "", "")[:3]
    split = split or SPLITS[purpose]
    try:
        dataset = datasets.load_dataset(repository, config or None, split=split)
    except Exception as error:  # the library raises many kinds; all mean that the data is not available
        raise DataError(
            f"{name} is not a file here, and the split {split!r} of a data set of this name cannot be loaded "
            f"({reason(error)}): give a file, or owner/name:config:split"
        ) from None
    columns = list(dataset.column_names)
    check_columns(columns, name)
    rows = dataset.select_columns([column for column in columns if column in COLUMNS])
    content = Content.of((f"{name}, row {number}", chosen_columns(row, columns)) for number, row in enumerate(rows, 1))
    if content.empty:
        raise DataError(f"{name} is empty: use another split, or another data set")
    return content
