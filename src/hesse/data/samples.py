"""Samples of token ids for calibration and evaluation, from text or from given ids."""

import hashlib
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from hesse.data.sources import Purpose, read_content
from hesse.data.tokenizer import load_tokenizer, usable_tokenizer
from hesse.errors import DataError, OptionError

# Documents per tokenizer call: enough to keep all cores busy, few enough to hold as Python lists of ids.
DOCUMENTS_A_CALL = 1024
LARGEST_ID = torch.iinfo(torch.int64).max


@dataclass(frozen=True, eq=False)  # tensors do not compare to one bool: compare `fingerprint`
class Samples:
    """Samples of token ids, in order."""

    ids: tuple[Tensor, ...]  # each (tokens,) int64
    source: str  # the data as the user gave it, or "default calibration text"
    exact: bool  # the data gave token ids: exactly these tokens, one sample per line

    @property
    def longest(self) -> int:
        """Return the length of the longest sample, in tokens."""
        return max(len(ids) for ids in self.ids)

    def first(self, count: int) -> "Samples":
        """Return the first `count` samples, or all if there are fewer."""
        return replace(self, ids=self.ids[:count])

    def batches(self, batch_size: int) -> list[Tensor]:
        """Return batches (samples, tokens) of at most `batch_size` samples of equal length, so that none is padded.

        Lengths are in the order of their first sample; samples of one length keep their order.

        Raises:
            OptionError: `batch_size` is below 1.
        """
        if batch_size < 1:
            raise OptionError(f"the batch size is {batch_size}: use 1 or more")
        by_length: dict[int, list[Tensor]] = {}
        for ids in self.ids:
            by_length.setdefault(len(ids), []).append(ids)
        return [
            torch.stack(samples[start : start + batch_size])
            for samples in by_length.values()
            for start in range(0, len(samples), batch_size)
        ]

    def fingerprint(self) -> str:
        """Return the SHA-256 of the lengths and tokens, in hexadecimal; it does not depend on the source's name."""
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
    """Read samples from `data`, and further samples to hold out.

    Documents are joined by the tokenizer's end-of-sequence token (a newline if it has none), tokenised without other
    special tokens, and cut into windows of `length` tokens; an incomplete last window is dropped. Calibration takes
    windows in an order drawn with `seed`, evaluation takes them from the first on; evaluation text that is shorter than
    a window is the only sample, whatever `count`.

    Data with token ids gives one sample per line, whatever `count`, `length`, `seed` and `reserve`.

    Args:
        data: a .txt, .jsonl or .parquet file; a data set id `owner/name`, `owner/name:config` or
            `owner/name:config:split`, which is downloaded whole; lists of token ids; None or `default` for the text
            shipped with Hesse. A line of .jsonl is an object with `text` or with `input_ids`; a .parquet file or
            data set has a column `text`.
        tokenizer_folder: the model folder whose tokenizer turns text into tokens; not read for token ids.
        count: number of windows; None for all that are not reserved.
        length: tokens per window.
        seed: orders the windows for calibration.
        purpose: decides the order, the shipped text and, for a data set id without a split, the split (train or test).
        limit: number of positions of the model; None for no limit.
        reserve: number of windows to hold out, after the first `count`.

    Returns:
        The samples and the held-out samples; the held-out samples are empty for token ids.

    Raises:
        DataError: the data is missing, damaged, of an unknown type, too short, or too long for the model.
        OptionError: `count`, `length` or `reserve` is too small, or `length` is above `limit`.
    """
    if length < 2:
        raise OptionError(f"the sample length is {length} tokens: use 2 or more, as the first predicts the second")
    if count is not None and count < 1:
        raise OptionError(f"{count} samples were asked for: use 1 or more")
    if reserve < 0:
        raise OptionError(f"{reserve} reserved samples were asked for: use 0 or more")
    source, content = read_content(data, purpose)
    if isinstance(content, dict):
        ids = tuple(_exact_sample(f"{source}, {place}", raw, limit) for place, raw in content.items())
        return Samples(ids, source, exact=True), Samples((), source, exact=True)
    if limit is not None and length > limit:
        raise OptionError(f"the sample length is {length} tokens, but the model has positions for {limit}: use {limit}")
    tokens = _tokenise(content, tokenizer_folder)
    windows = list(tokens[: len(tokens) // length * length].view(-1, length))
    if purpose == "evaluation" and not windows and len(tokens) >= 2:
        return Samples((tokens,), source, exact=False), Samples((), source, exact=False)
    number = len(windows) - reserve if count is None else count
    if number < 1 or number + reserve > len(windows):
        raise DataError(_shortage(source, len(tokens), len(windows), length, count, reserve))
    if purpose == "calibration":
        order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
        windows = [windows[index] for index in order.tolist()]
    # Clones: a window is a view of all tokens, and would keep them in memory.
    chosen = [window.clone() for window in windows[: number + reserve]]
    return Samples(tuple(chosen[:number]), source, exact=False), Samples(tuple(chosen[number:]), source, exact=False)


def _shortage(source: str, tokens: int, windows: int, length: int, count: int | None, reserve: int) -> str:
    asked = "a sample" if count in (None, 1) else f"{count} samples"
    held_out = f" and {reserve} more to hold out" if reserve else ""
    return (
        f"{source} is too short for {asked}{held_out}: its {tokens} tokens give {windows} windows of {length}; "
        "use fewer --samples, a shorter --length, or more text"
    )


def _exact_sample(place: str, raw: object, limit: int | None) -> Tensor:
    """Check token ids, and return them as a tensor (tokens,) int64."""
    if not isinstance(raw, Sequence) or isinstance(raw, str):
        raise DataError(f"{place}: the token ids are {type(raw).__name__}, not a list of whole numbers")
    if len(raw) < 2:
        raise DataError(f"{place} has {len(raw)} token ids: a sample needs at least 2, so remove it or make it longer")
    for value in raw:
        if type(value) is not int or not 0 <= value <= LARGEST_ID:  # bool is an int, and no token id
            raise DataError(f"{place}: {reprlib.repr(value)} is not a token id; ids are whole numbers from 0")
    if limit is not None and len(raw) > limit:
        raise DataError(f"{place} has {len(raw)} tokens, but the model has positions for {limit}: shorten or split it")
    return torch.tensor(raw, dtype=torch.int64)


def _tokenise(texts: list[str], folder: Path) -> Tensor:
    """Return the token ids (tokens,) of all documents, with a separator between each two."""
    tokenizer = load_tokenizer(folder)
    documents = [text for text in texts if text]
    separator = torch.tensor([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id], dtype=torch.int64)
    if not len(separator):
        documents = [text + "\n" for text in documents[:-1]] + documents[-1:]
    pieces: list[Tensor] = []
    for start in range(0, len(documents), DOCUMENTS_A_CALL):
        batch = documents[start : start + DOCUMENTS_A_CALL]
        # Not verbose: it would warn that a document is too long for the model, but documents are cut into windows.
        with usable_tokenizer(folder):
            encoded = tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
        for ids in encoded:
            pieces += [torch.tensor(ids, dtype=torch.int64), separator]
    return torch.cat(pieces[:-1]) if pieces else torch.empty(0, dtype=torch.int64)
