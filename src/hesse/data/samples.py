"""From text, or ready tokens, to samples."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from hesse.errors import DataError, OptionError
from hesse.models import locate

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


@dataclass(frozen=True, eq=False)
class Samples:
    """Sequences of token ids, where they came from, and whether they were given ready made."""

    ids: tuple[Tensor, ...]  # each (tokens,) int64
    source: str
    exact: bool

    def batches(self, batch_size: int) -> list[Tensor]:
        """Batches (samples, tokens) of at most `batch_size`; only samples of one length share a batch."""
        by_length: dict[int, list[Tensor]] = {}
        for sample in self.ids:
            by_length.setdefault(len(sample), []).append(sample)
        return [batch for same in by_length.values() for batch in torch.stack(same).split(batch_size)]

    def fingerprint(self) -> str:
        """A hash of all tokens, to tell one run's data from another's."""
        state = hashlib.sha256()
        for sample in self.ids:
            state.update(len(sample).to_bytes(8, "little"))
            state.update(sample.to(torch.int64).numpy().tobytes())
        return state.hexdigest()


def read_samples(
    data: str | Path | Sequence[Sequence[int]] | None,
    tokenizer_folder: Path,
    *,
    count: int | None,
    length: int,
    seed: int,
    purpose: Literal["calibration", "evaluation"],
    limit: int | None,
    reserve: int = 0,
) -> tuple[Samples, Samples]:
    """Samples of `data`, and `reserve` others that do not overlap them.

    `data` is a .txt, .jsonl or .parquet file, a datasets id (`owner/name`, `owner/name:config:split`), lists of token
    ids, or None for the shipped text. Text is cut into windows of `length` tokens, for calibration in an order drawn
    with `seed`, for evaluation in their own (all of them where `count` is None). Ready token ids are used as they are,
    all of them, one sample a line, with nothing reserved. `limit` is the most tokens that the model takes.

    Raises:
        DataError: the data is missing, empty, too short, malformed or too long; the message says where.
        OptionError: `length` or `count` is too small to mean anything.
    """
    if length < 2 or (count is not None and count < 1):
        raise OptionError(f"{count} samples of {length} tokens mean nothing: use at least 1 of at least 2")
    if data is not None and not isinstance(data, str | Path):
        return _exact(enumerate(data, 1), "token ids", limit)
    path = _shipped(purpose) if data is None or str(data) == locate.DEFAULT else Path(data)
    name = f"the shipped {purpose} text" if path != Path(str(data)) else str(data)
    if path.suffix == ".jsonl" and path.is_file():
        rows = list(_json_lines(path))
        if not rows:
            raise DataError(f"{path} is empty: give a file with one JSON object a line")
        if "input_ids" in rows[0][1]:
            return _exact(((number, _field(path, number, row, "input_ids")) for number, row in rows), name, limit)
        documents = [_field(path, number, row, "text") for number, row in rows]
        for (number, _), text in zip(rows, documents, strict=True):
            if not isinstance(text, str):
                raise DataError(f"{path} line {number}: `text` is no string")
    else:
        documents = list(_documents(path, str(data)))
    tokens = _tokens(documents, tokenizer_folder)
    return _windows(tokens, name, count, length, seed, purpose, reserve)


def _shipped(purpose: str) -> Path:
    return locate.DEFAULT_FOLDER / ("calibration.txt" if purpose == "calibration" else "held_out.txt")


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path} line {number} is not valid JSON: {error}") from None
        if not isinstance(row, dict) or not ("text" in row or "input_ids" in row):
            raise DataError(f"{path} line {number} has neither `text` nor `input_ids`")
        yield number, row


def _field(path: Path, number: int, row: dict[str, Any], field: str) -> Any:
    if field not in row:
        raise DataError(f"{path} line {number} has no `{field}`, as the lines before it have: use one kind a file")
    return row[field]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def _documents(path: Path, asked: str) -> Iterator[str]:
    """The texts of a .txt or .parquet file, or of a data set."""
    if path.is_file():
        if path.suffix == ".txt":
            yield _read_text(path)
        elif path.suffix == ".parquet":
            yield from _parquet(path)
        else:
            raise DataError(f"{path} is of an unknown kind: use .txt, .jsonl or .parquet")
    elif path.suffix in (".txt", ".jsonl", ".parquet", ".json") or path.exists() or asked.count("/") != 1:
        raise DataError(f"{asked} is no file: give a .txt, .jsonl or .parquet file, or a datasets id such as owner/name")
    else:
        yield from _dataset(asked)


def _parquet(path: Path) -> Iterator[str]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise DataError(f"{path} needs pyarrow: pip install 'hesse[data]'") from None
    try:
        table = parquet.read_table(path, columns=["text"])
    except (ArrowException, OSError) as error:
        raise DataError(f"{path} has no readable column `text`: {str(error).splitlines()[0]}") from None
    yield from (text for text in table["text"].to_pylist() if text)


def _dataset(asked: str) -> Iterator[str]:
    """Texts of `owner/name`, `owner/name:config` or `owner/name:config:split`."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError(f"{asked} is no file, and data sets need the datasets library: pip install 'hesse[data]'") from None
    name, config, split = (*asked.split(":"), "", "")[:3]
    try:
        rows = load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # the library raises many kinds; all mean that the data cannot be had
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{asked} is no file here, and as a data set it cannot be had: {reason}") from None
    if "text" not in rows.column_names:
        raise DataError(f"the data set {asked} has no column `text`; it has {', '.join(rows.column_names)}")
    yield from (text for text in rows["text"] if text)


def _tokens(documents: list[str], folder: Path) -> Tensor:
    """The tokens of all documents one after another, the tokenizer's end-of-text token between them."""
    from transformers import AutoTokenizer  # imported late: not needed for ready token ids

    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise DataError(f"{folder} has no tokenizer: copy its files there, or give a .jsonl with ready `input_ids`")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # a damaged tokenizer fails in as many ways as there are kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"the tokenizer in {folder} cannot be loaded: {reason}") from None
    tokenizer.model_max_length = 1 << 60  # whole texts are tokenised, then cut
    separator = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    ids: list[int] = []
    for text in documents:
        ids += tokenizer(text, add_special_tokens=False)["input_ids"] + separator
    return torch.tensor(ids[: len(ids) - len(separator)], dtype=torch.int64)


def _windows(
    tokens: Tensor, name: str, count: int | None, length: int, seed: int, purpose: str, reserve: int
) -> tuple[Samples, Samples]:
    whole = len(tokens) // length
    if purpose == "evaluation":
        if whole == 0 and len(tokens) >= 2:
            return Samples((tokens,), name, False), Samples((), name, False)
        needed = count or 1
    else:
        needed = (count or 1) + reserve
    if whole < needed:
        also = f" and {reserve} to check the result" if reserve else ""
        raise DataError(
            f"{name} has {len(tokens)} tokens, which is {whole} samples of {length}; {count or 1}{also} are needed: "
            "use fewer --samples, a shorter --length, or more text"
        )
    windows = tokens[: whole * length].view(whole, length)
    if purpose == "calibration":
        windows = windows[torch.randperm(whole, generator=torch.Generator().manual_seed(seed))]
    chosen = whole if count is None else count
    return (
        Samples(tuple(windows[:chosen]), name, False),
        Samples(tuple(windows[chosen : chosen + reserve]), name, False),
    )


def _exact(rows: Iterator[tuple[int, Any]], name: str, limit: int | None) -> tuple[Samples, Samples]:
    """Ready token ids, one sample a line, as they are."""
    samples = []
    for number, ids in rows:
        if not isinstance(ids, Sequence) or not all(type(i) is int and i >= 0 for i in ids):
            raise DataError(f"{name} line {number}: `input_ids` must be a list of whole numbers that are not negative")
        if len(ids) < 2:
            raise DataError(f"{name} line {number}: {len(ids)} tokens are too few, a sample needs at least 2")
        if limit is not None and len(ids) > limit:
            raise DataError(f"{name} line {number}: {len(ids)} tokens are more than the {limit} that the model takes")
        samples.append(torch.tensor(ids, dtype=torch.int64))
    if not samples:
        raise DataError(f"{name} holds no samples")
    return Samples(tuple(samples), name, True), Samples((), name, True)
