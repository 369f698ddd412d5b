"""Read the records of data files by their extension: text, JSON, CSV and parquet, the first three also gzipped."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from hesse.data.records import COLUMNS, KEYS
from hesse.errors import DataError, reason

LONGEST_LINE = 1 << 28  # bytes: more than any book
INSTALL = "is not installed: pip install 'hesse[data]', or give a .txt or .jsonl file"
FILE_TYPES = "a .txt, .jsonl, .json, .csv or .parquet file (the first four also as .gz)"

Records = Iterator[tuple[str, object]]  # records by their place


def file_type(path: Path) -> str:
    """Return a file's extension in lower case, without .gz where a gzipped file of the type is read."""
    name = path.name.lower()
    inner = Path(name.removesuffix(".gz")).suffix
    return inner if name.endswith(".gz") and inner in READERS and inner != ".parquet" else Path(name).suffix


def read_records(path: Path) -> Records:
    """Yield the records of a file, each with its place, such as "chats.jsonl, line 3".

    Raises:
        DataError: the file cannot be read, or is not of the type that its extension says.
    """
    try:
        yield from READERS[file_type(path)](path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {reason(error)}") from None


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    with path.open("rb") as file:
        if not path.name.lower().endswith(".gz"):
            yield file
            return
        with gzip.open(file) as content:
            yield cast(IO[bytes], content)


def _read_text(path: Path) -> Records:
    with _opened(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig").read()
    if text.strip():
        yield str(path), {"text": text}


def _read_jsonl(path: Path) -> Records:
    # Split lines as bytes: str.splitlines would also split at characters that a JSON string may hold.
    with _opened(path) as file:
        yield from _lines(path, iter(lambda: file.readline(LONGEST_LINE + 1), b""))


def _lines(path: Path, lines: Iterator[bytes]) -> Records:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        if len(line) > LONGEST_LINE:
            raise DataError(f"{place} has more than {LONGEST_LINE:,} bytes: write one document per line")
        try:
            yield place, json.loads(line.strip().decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            # The error's own text names line 1, because json sees only this line.
            located = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else None
            problem = located or reason(error)
            raise DataError(f"{place} is not valid JSON ({problem}): write one object per line") from None


def _read_json(path: Path) -> Records:
    with _opened(path) as file:
        content = file.read()
    if not content.strip():
        return
    try:
        whole = json.loads(content.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        first = content.lstrip(b"\xef\xbb\xbf \t\r\n")
        if first.startswith(b"{") and error.msg == "Extra data":  # JSON lines under another name
            yield from _lines(path, iter(io.BytesIO(content)))
            return
        problem = f"{error.msg}, line {error.lineno}, column {error.colno}"
        raise DataError(f"{path} is not valid JSON ({problem}): correct it") from None
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON ({reason(error)}): correct it") from None
    if isinstance(whole, dict) and not set(KEYS) & whole.keys():
        lists = [value for value in whole.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        whole = lists[0] if len(lists) == 1 else whole
    for number, entry in enumerate(whole if isinstance(whole, list) else [whole], 1):
        yield f"{path}, entry {number}", {"text": entry} if isinstance(entry, str) else entry


def _read_csv(path: Path) -> Records:
    longest = csv.field_size_limit(LONGEST_LINE)
    try:
        with _opened(path) as file:
            rows = csv.DictReader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), strict=True)
            columns = rows.fieldnames or []
            if columns:
                check_columns(columns, str(path))
            for row in rows:
                yield f"{path}, line {rows.line_num}", chosen_columns(row, columns)
    except csv.Error as error:
        raise DataError(f"{path}, line {rows.line_num} is not valid CSV ({reason(error)}): correct it") from None
    finally:
        csv.field_size_limit(longest)


def _read_parquet(path: Path) -> Records:
    try:
        import pyarrow  # imported late: optional, and only this kind of file needs it
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path} is a .parquet file, and pyarrow {INSTALL}") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            check_columns(columns, str(path))
            rows = file.read(columns=[name for name in columns if name in COLUMNS]).to_pylist()
    except (pyarrow.ArrowException, LookupError, ValueError) as error:
        raise DataError(f"{path} is not a readable .parquet file ({reason(error)}): copy it again") from None
    for number, row in enumerate(rows, 1):
        yield f"{path}, row {number}", chosen_columns(row, columns)


def check_columns(columns: Sequence[str], source: str) -> None:
    """Raise DataError if no column of a table holds text, chats or token ids."""
    if not set(KEYS) & set(columns):
        raise DataError(
            f'{source} has no column "text" (it has {", ".join(map(str, columns))}), nor one of '
            f"{', '.join(key for key in KEYS if key != 'text')}: rename the one with the text"
        )


def chosen_columns(row: Mapping[str, Any], columns: Sequence[str]) -> dict[str, Any]:
    """Return a row's entries without the keys that a column before them makes meaningless, nor other columns."""
    key = next(key for key in KEYS if key in columns)
    return {name: row[name] for name in COLUMNS if name in row and (name == key or name not in KEYS)}


READERS: Mapping[str, Callable[[Path], Records]] = {
    ".txt": _read_text,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
