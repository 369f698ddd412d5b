"""Samples of token ids for calibration and evaluation, from text or from ready ids."""

import hashlib
import json
import os
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from hesse.errors import DataError, OptionError
from hesse.models.locate import DEFAULT, DEFAULT_FOLDER

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Purpose = Literal["calibration", "evaluation"]
# The text shipped with the package: what it is called in messages, and its file in `DEFAULT_FOLDER`.
SHIPPED = {
    "calibration": ("default calibration text", "calibration.txt"),
    "evaluation": ("default held-out text", "held_out.txt"),
}
# A data set id without a split means this one: evaluation must not see what calibration saw.
SPLITS = {"calibration": "train", "evaluation": "test"}
DATASET_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(:[^:]*(:.*)?)?")
# Documents tokenised in one call: enough to keep all cores busy, and few enough to hold as Python lists of ids.
DOCUMENTS_A_CALL = 1024
LARGEST_ID = torch.iinfo(torch.int64).max
INSTALL = "is not installed: pip install 'hesse[data]', or give a .txt or .jsonl file"
TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "*.spm")

# Documents, or raw token ids by the place they were found at ("line 3").
Content = list[str] | dict[str, object]


@dataclass(frozen=True, eq=False)  # tensors have no single truth to compare by: use `fingerprint`
class Samples:
    """Token ids that go through a model, in order."""

    ids: tuple[Tensor, ...]  # each (tokens,) int64
    source: str  # what a person typed, or "default calibration text"
    exact: bool  # the data gave ready ids: these very tokens, one sample a line

    def batches(self, batch_size: int) -> list[Tensor]:
        """Batches (samples, tokens) of at most `batch_size` samples of equal length, so that none is padded.

        Lengths come in the order of their first sample, and samples of one length in their own order.

        Raises:
            OptionError: `batch_size` is below 1.
        """
        if batch_size < 1:
            raise OptionError(f"the batch size is {batch_size}: use 1 or more")
        by_length: dict[int, list[Tensor]] = {}
        for ids in self.ids:
            by_length.setdefault(len(ids), []).append(ids)
        return [
            torch.stack(alike[start : start + batch_size])
            for alike in by_length.values()
            for start in range(0, len(alike), batch_size)
        ]

    def fingerprint(self) -> str:
        """SHA-256 over the lengths and the tokens, in hexadecimal; the source's name does not enter."""
        digest = hashlib.sha256()
        for ids in self.ids:
            digest.update(len(ids).to_bytes(8, "little"))
            digest.update(ids.cpu().numpy().astype("<i8").tobytes())
        return digest.hexdigest()


def read_samples(
    data: str | Path | Sequence[Sequence[int]] | None,
    tokenizer_folder: Path,
    *,
    count: int | None,
    length: int,
    seed: int,
    purpose: Purpose,
    limit: int | None,
    reserve: int = 0,
) -> tuple[Samples, Samples]:
    """The samples of `data`, and others that are kept apart from them.

    Documents are joined by the tokenizer's end-of-sequence token (a newline if it has none), tokenised without other
    special tokens, and cut into windows of `length` tokens; an incomplete last window is dropped. Calibration takes
    windows in an order drawn with `seed`, evaluation takes them from the first on; evaluation text that is shorter than
    a window is the only sample, whatever `count`.

    Data with ready token ids is taken as it is, one sample a line, whatever `count`, `length`, `seed` and `reserve`.

    Args:
        data: a .txt, .jsonl or .parquet file; a data set id `owner/name`, `owner/name:config` or
            `owner/name:config:split`, which is downloaded whole; lists of token ids; None or `default` for the text
            shipped with Hesse. A line of .jsonl is an object with `text` or with `input_ids`; a .parquet file and a
            data set have a column `text`.
        tokenizer_folder: the model folder whose tokenizer turns text into tokens; not read for ready token ids.
        count: windows to take; None for all that are not reserved.
        length: tokens a window.
        seed: orders the windows for calibration.
        purpose: chooses order, shipped text and, for an id without one, split (train or test).
        limit: the most tokens that the model has positions for; None for no limit.
        reserve: windows to keep apart, after the first `count`.

    Returns:
        The samples and the reserved ones. The latter are empty for ready token ids.

    Raises:
        DataError: the data is missing, damaged, of no known kind, too short, or too long for the model.
        OptionError: `count`, `length` or `reserve` is too small, or `length` is above `limit`.
    """
    if length < 2:
        raise OptionError(f"the sample length is {length} tokens: use 2 or more, as the first predicts the second")
    if count is not None and count < 1:
        raise OptionError(f"{count} samples were asked: use 1 or more")
    if reserve < 0:
        raise OptionError(f"{reserve} reserved samples were asked: use 0 or more")
    source, content = _read(data, purpose)
    if isinstance(content, dict):
        ids = tuple(_exact_sample(f"{source}, {place}", raw, limit) for place, raw in content.items())
        return Samples(ids, source, exact=True), Samples((), source, exact=True)
    if limit is not None and length > limit:
        raise OptionError(f"the sample length is {length} tokens, but the model has positions for {limit}: use {limit}")
    tokens = _tokenise(content, tokenizer_folder)
    windows = list(tokens[: len(tokens) // length * length].view(-1, length))
    if purpose == "evaluation" and not windows and len(tokens) >= 2:
        return Samples((tokens,), source, exact=False), Samples((), source, exact=False)
    taken = len(windows) - reserve if count is None else count
    if taken < 1 or taken + reserve > len(windows):
        raise DataError(_too_little(source, len(tokens), len(windows), length, count, reserve))
    if purpose == "calibration":
        order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
        windows = [windows[index] for index in order.tolist()]
    # Clones: a window is a view of all tokens, and would keep them in memory.
    chosen = [window.clone() for window in windows[: taken + reserve]]
    return Samples(tuple(chosen[:taken]), source, exact=False), Samples(tuple(chosen[taken:]), source, exact=False)


def _too_little(source: str, tokens: int, windows: int, length: int, count: int | None, reserve: int) -> str:
    asked = "a sample" if count in (None, 1) else f"{count} samples"
    held_out = f" and {reserve} more to hold out" if reserve else ""
    return (
        f"{source} is too short for {asked}{held_out}: its {tokens} tokens give {windows} windows of {length}; "
        "use fewer --samples, a shorter --length, or more text"
    )


def _read(data: str | Path | Sequence[Sequence[int]] | None, purpose: Purpose) -> tuple[str, Content]:
    """What to call the data, and what it holds."""
    if data is None or (isinstance(data, str) and data == DEFAULT):
        source, name = SHIPPED[purpose]
        path = DEFAULT_FOLDER / name
        if not path.is_file():
            raise DataError(
                f"the {source} is missing from this installation ({path}): install Hesse again, or give a file"
            )
        return source, _read_file(path)
    if isinstance(data, str | Path):
        # os.path and not Path's own: those raise on an unknown ~user, and on a name too long for the file system.
        path = Path(os.path.expanduser(data))
        if isinstance(data, str) and not os.path.exists(path) and _is_dataset_id(data):
            return data, _read_dataset(data, purpose)
        return str(data), _read_file(path)
    if not data:
        raise DataError("the list of token ids is empty: give at least one list of token ids")
    return "the token ids given", {f"sample {number}": ids for number, ids in enumerate(data, 1)}


def _is_dataset_id(name: str) -> bool:
    return DATASET_ID.fullmatch(name) is not None and Path(name).suffix.lower() not in READERS


def _read_file(path: Path) -> Content:
    if not os.path.exists(path):
        raise DataError(f"{path} does not exist: give {KINDS}, a data set id such as owner/name, or `default`")
    if path.is_dir():
        raise DataError(f"{path} is a folder: give a file in it, {KINDS}")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path} has the extension {path.suffix or '(none)'}: give {KINDS}")
    try:
        content = reader(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {_first_line(error)}") from None
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
    # Lines are split as bytes: a JSON string may hold characters that are line ends to str.splitlines.
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            place = f"line {number}"
            try:
                record = json.loads(line.strip().decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                # Its own text would name line 1: this line is all it sees.
                located = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else None
                reason = located or _first_line(error)
                raise DataError(f"{path}, {place} is not valid JSON ({reason}): write one object a line") from None
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
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is no readable .parquet file ({_first_line(error)}): copy it again") from None
    return list(_checked_texts(values, str(path)))


def _read_dataset(name: str, purpose: Purpose) -> Content:
    try:
        import datasets  # imported late: optional, and it takes a second
    except ImportError:
        raise DataError(f"{name} is no file here, and for a data set id the package datasets {INSTALL}") from None
    repository, config, split = (*name.split(":", 2), "", "")[:3]
    split = split or SPLITS[purpose]
    try:
        dataset = datasets.load_dataset(repository, config or None, split=split)
    except Exception as error:  # the library raises many kinds; all mean that there is no such data to be had
        raise DataError(
            f"{name} is no file here, and the split {split!r} of a data set of this name cannot be had "
            f"({_first_line(error)}): give a file, or owner/name:config:split"
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
KINDS = "a .txt, .jsonl or .parquet file"


def _checked_texts(values: Sequence[object], source: str) -> Iterator[str]:
    return (_checked_text(value, f"{source}, row {number}") for number, value in enumerate(values, 1))


def _checked_text(value: object, place: str) -> str:
    if not isinstance(value, str):
        raise DataError(f'{place}: "text" is {type(value).__name__}, not a string: correct or remove it')
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell and no tokenizer takes
        raise DataError(f'{place}: "text" holds half a character (a lone surrogate): correct or remove it') from None
    return value


def _exact_sample(place: str, raw: object, limit: int | None) -> Tensor:
    """Ready token ids as a tensor (tokens,) int64."""
    if not isinstance(raw, Sequence) or isinstance(raw, str):
        raise DataError(f"{place}: the token ids are {type(raw).__name__}, not a list of whole numbers")
    if len(raw) < 2:
        raise DataError(f"{place} has {len(raw)} token ids: a sample needs at least 2, so remove it or make it longer")
    for value in raw:
        if type(value) is not int or not 0 <= value <= LARGEST_ID:  # bool is an int, and no token id
            raise DataError(f"{place}: {reprlib.repr(value)} is no token id; ids are whole numbers from 0 on")
    if limit is not None and len(raw) > limit:
        raise DataError(f"{place} has {len(raw)} tokens, but the model has positions for {limit}: shorten or split it")
    return torch.tensor(raw, dtype=torch.int64)


def _tokenise(texts: list[str], folder: Path) -> Tensor:
    """All documents' token ids (tokens,), with a separator between each two."""
    tokenizer = _load_tokenizer(folder)
    documents = [text for text in texts if text]
    separator = torch.tensor([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id], dtype=torch.int64)
    if not len(separator):
        documents = [text + "\n" for text in documents[:-1]] + documents[-1:]
    pieces: list[Tensor] = []
    for start in range(0, len(documents), DOCUMENTS_A_CALL):
        batch = documents[start : start + DOCUMENTS_A_CALL]
        # Not verbose: it would warn that a document is longer than the model's positions. It is cut into windows.
        for ids in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
            pieces += [torch.tensor(ids, dtype=torch.int64), separator]
    return torch.cat(pieces[:-1]) if pieces else torch.empty(0, dtype=torch.int64)


def _load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer  # imported late: it takes time, and ready token ids need no tokenizer

    way_out = "copy them from the original model, or give a .jsonl file with input_ids, which needs no tokenizer"
    lacking = DataError(f"{folder} lacks tokenizer files, so text cannot be turned into tokens: {way_out}")
    # Without files some classes are built nonetheless, with no vocabulary, and turn every text into nothing.
    if not any(path for pattern in TOKENIZER_FILES for path in folder.glob(pattern)):
        raise lacking
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise many kinds, bare Exception among them
        raise DataError(f"the tokenizer files in {folder} cannot be used ({_first_line(error)}): {way_out}") from None
    if not tokenizer.vocab_size:
        raise lacking
    return tokenizer


def _first_line(error: Exception) -> str:
    """The reason in one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(":. ")
