"""Read text and token ids from files, data sets, and the text shipped with the package."""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from hesse.checkpoints.locate import DEFAULT, DEFAULT_FOLDER
from hesse.errors import DataError, reason

Purpose = Literal["calibration", "evaluation"]
# The text shipped with the package: its name in messages, and its file in `DEFAULT_FOLDER`.
SHIPPED = {
    "calibration": ("default calibration text", "calibration.txt"),
    "evaluation": ("default held-out text", "held_out.txt"),
}
# The split of a data set id that names none: evaluation must not use calibration data.
SPLITS = {"calibration": "train", "evaluation": "test"}
DATASET_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(:[^:]*(:.*)?)?")
LONGEST_LINE = 1 << 28  # bytes: more than any book
INSTALL = "is not installed: pip install 'hesse[data]', or give a .txt or .jsonl file"

# Documents, or raw token ids by their place in the source ("line 3").
Content = list[str] | dict[str, object]


def read_content(data: str | Path | Sequence[Sequence[int]] | None, purpose: Purpose) -> tuple[str, Content]:
    """Read `data`; return its name for messages and its content."""
    if data is None or (isinstance(data, str) and data == DEFAULT):
        source, name = SHIPPED[purpose]
        path = DEFAULT_FOLDER / name
        if not path.is_file():
            raise DataError(
                f"the {source} is missing from this installation ({path}): install Hesse again, or give a file"
            )
        return source, _read_file(path)
    if isinstance(data, str | Path):
        # os.path, because Path raises on an unknown ~user and on a name too long for the file system.
        path = Path(os.path.expanduser(data))
        if is_dataset_id(data):
            return str(data), dataset_texts(str(data), purpose)
        return str(data), _read_file(path)
    if not data:
        raise DataError("the list of token ids is empty: give at least one list of token ids")
    return "the token ids given", {f"sample {number}": ids for number, ids in enumerate(data, 1)}


def is_dataset_id(data: str | Path) -> bool:
    """True if `data` has the form of a data set id, and no such file exists."""
    if not isinstance(data, str) or os.path.exists(os.path.expanduser(data)):
        return False
    return DATASET_ID.fullmatch(data) is not None and Path(data).suffix.lower() not in READERS


def _read_file(path: Path) -> Content:
    if not os.path.exists(path):
        raise DataError(f"{path} does not exist: give {FILE_TYPES}, a data set id such as owner/name, or `default`")
    if path.is_dir():
        raise DataError(f"{path} is a folder: give a file in it, {FILE_TYPES}")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path} has the extension {path.suffix or '(none)'}: give {FILE_TYPES}")
    try:
        content = reader(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {reason(error)}") from None
    if not content:
        raise DataError(f"{path} is empty: give a file with text in it")
    return content


def _read_text(path: Path) -> Content:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    return [text] if text.strip() else []


def _read_jsonl(path: Path) -> Content:
    records: dict[str, dict[str, Any]] = {}
    # Split lines as bytes: str.splitlines would also split at characters that a JSON string may hold.
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), b""), 1):
            if not line.strip():
                continue
            place = f"line {number}"
            if len(line) > LONGEST_LINE:
                raise DataError(f"{path}, {place} has more than {LONGEST_LINE:,} bytes: write one document per line")
            try:
                record = json.loads(line.strip().decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                # The error's own text names line 1, because json sees only this line.
                located = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else None
                problem = located or reason(error)
                raise DataError(f"{path}, {place} is not valid JSON ({problem}): write one object per line") from None
            if not isinstance(record, dict) or not {"text", "input_ids"} & record.keys():
                raise DataError(f'{path}, {place} has neither "text" nor "input_ids": write an object with one of them')
            records[place] = record
    exact = [place for place, record in records.items() if "input_ids" in record]
    if not exact:
        return [_checked_text(record["text"], f"{path}, {place}") for place, record in records.items()]
    for place, record in records.items():
        if "input_ids" not in record:
            raise DataError(f'{path}, {place} has only "text", but {exact[0]} has "input_ids": use one kind of line')
    return {place: record["input_ids"] for place, record in records.items()}


def _read_parquet(path: Path) -> Content:
    try:
        import pyarrow  # imported late: optional, and only this kind of file needs it
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path} is a .parquet file, and pyarrow {INSTALL}") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if "text" not in columns:
                raise DataError(
                    f'{path} has no column "text" (it has {", ".join(columns)}): rename the one with the text'
                )
            values = file.read(columns=["text"]).column("text").to_pylist()
    except (pyarrow.ArrowException, LookupError, ValueError) as error:
        raise DataError(f"{path} is not a readable .parquet file ({reason(error)}): copy it again") from None
    return list(_checked_texts(values, str(path)))


def dataset_texts(name: str, purpose: Purpose) -> list[str]:
    """Return the rows of a data set `owner/name[:config[:split]]`, which the library downloads if it must.

    Raises:
        DataError: it cannot be loaded, or has no texts.
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
    if "text" not in dataset.column_names:
        columns = ", ".join(dataset.column_names)
        raise DataError(
            f'{name} has no column "text" (it has {columns}): use a data set that has one, or a .jsonl file'
        )
    texts = list(_checked_texts(dataset["text"], name))
    if not texts:
        raise DataError(f"{name} is empty: use another split, or another data set")
    return texts


READERS: Mapping[str, Callable[[Path], Content]] = {
    ".txt": _read_text,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
FILE_TYPES = "a .txt, .jsonl or .parquet file"


def _checked_texts(values: Sequence[object], source: str) -> Iterator[str]:
    return (_checked_text(value, f"{source}, row {number}") for number, value in enumerate(values, 1))


def _checked_text(value: object, place: str) -> str:
    if not isinstance(value, str):
        raise DataError(f'{place}: "text" is {type(value).__name__}, not a string: correct or remove it')
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON allows and no tokenizer accepts
        raise DataError(f'{place}: "text" holds half a character (a lone surrogate): correct or remove it') from None
    return value
