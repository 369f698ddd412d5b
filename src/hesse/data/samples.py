"""Samples of token ids for calibration and evaluation, from text or from given ids."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from hesse.data.mixtures import interleave, largest_mixture, quotas
from hesse.data.sources import Purpose, Source, TokenData, read_sources
from hesse.data.windows import tokenised
from hesse.errors import DataError, OptionError


@dataclass(frozen=True, eq=False)  # tensors do not compare to one bool: compare `fingerprint`
class Samples:
    """Samples of token ids, in order."""

    ids: tuple[Tensor, ...]  # each (tokens,) int64; tokens that are not scored as `hide_from_loss` stores them
    source: str  # the data as the user gave it, or "default calibration text"
    exact: bool  # the data gave token ids: exactly these tokens, one sample per line
    notes: tuple[str, ...] = ()  # how text became tokens, and departures from the options

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
    data: str | Path | TokenData | None,
    tokenizer_folder: Path,
    *,
    count: int | None,
    length: int,
    seed: int,
    purpose: Purpose,
    limit: int | None,
    reserve: int = 0,
    bos: bool | None = None,
) -> tuple[Samples, Samples]:
    """Read samples from `data`, and further samples to hold out.

    Documents get the special tokens that the tokenizer's own post-processor adds, are joined by its end-of-sequence
    token (a newline if it has none) unless they end with special tokens, and are cut into windows of `length` tokens;
    an incomplete last window is dropped. Where documents start with BOS, each window does. Chats are as the tokenizer's
    template renders them. Calibration takes windows in an order drawn with `seed`, evaluation takes them from the first
    on. If there are fewer than `count` and `reserve`, all are taken, with a note; text that is shorter than a window is
    the only sample.

    Data with token ids gives one sample per line, whatever `count`, `length`, `seed` and `reserve`.

    A mixture has its sources' samples in proportion to their weights. Lines of token ids are like windows in it.

    Args:
        data: a .txt, .jsonl, .json, .csv or .parquet file, the first four also as .gz, or a folder of them; a data set
            id `owner/name`, `owner/name:config` or `owner/name:config:split`, which is downloaded whole; several of
            these with commas between, each with a weight such as `:0.3` or 1; lists of token ids; None or `default`
            for the text shipped with Hesse. A record has `text`, a chat (`messages`, `conversations` as ShareGPT has
            them, or `prompt` and `completion`), or `input_ids`, from which padding is cut by `attention_mask`; tokens
            whose `labels` are -100 are not scored.
        tokenizer_folder: the model folder whose tokenizer turns text into tokens; not read for token ids.
        count: number of windows; None for all that are not reserved.
        length: tokens per window.
        seed: orders the windows for calibration.
        purpose: decides the order, the shipped text and, for a data set id without a split, the split (train or test).
        limit: number of positions of the model; None for no limit.
        reserve: number of windows to hold out, after the first `count`.
        bos: start windows and documents of text with BOS, or not; None for what the tokenizer does.

    Returns:
        The samples and the held-out samples; the held-out samples are empty for token ids.

    Raises:
        DataError: the data is missing, damaged, of an unknown type, or too long for the model.
        OptionError: `count`, `length` or `reserve` is too small, `length` is above `limit`, or `bos` has no meaning.
    """
    if length < 2:
        raise OptionError(f"the sample length is {length} tokens: use 2 or more, as the first predicts the second")
    if count is not None and count < 1:
        raise OptionError(f"{count} samples were asked for: use 1 or more")
    if reserve < 0:
        raise OptionError(f"{reserve} reserved samples were asked for: use 0 or more")
    sources = read_sources(data, purpose)
    exact = all(source.content.samples for source in sources)
    if exact and bos is not None:
        raise OptionError(
            f"{sources[0].name} holds token ids, which are used as they are: leave out --bos and --no-bos"
        )
    if not exact and limit is not None and length > limit:
        raise OptionError(f"the sample length is {length} tokens, but the model has positions for {limit}: use {limit}")
    name = ", ".join(source.name for source in sources)
    notes = [note for source in sources for note in source.content.notes]
    pool = partial(_pool, folder=tokenizer_folder, length=length, limit=limit, bos=bos)
    pools = [pool(source) for source in sources]
    notes += dict.fromkeys(note for each in pools for note in each.notes)
    if exact and len(sources) == 1:
        return Samples(tuple(pools[0].samples), name, True, tuple(notes)), Samples((), name, True)
    chosen, held, shortages = _choose(sources, pools, count, reserve, seed if purpose == "calibration" else None)
    samples = Samples(chosen, name, exact, (*notes, *shortages))
    return samples, Samples(held, name, exact)


@dataclass(frozen=True, eq=False)
class _Pool:
    """Samples of one source to choose from."""

    samples: list[Tensor]  # windows, or samples of token ids
    size: str  # for messages
    notes: list[str]


def _pool(source: Source, folder: Path, length: int, limit: int | None, bos: bool | None) -> _Pool:
    if source.content.samples:
        ids = [record.sample(limit) for record in source.content.samples]
        return _Pool(ids, f"{len(ids)} samples of token ids", [])
    text = tokenised(source.content, folder, bos)
    windows, count = text.windows(length), len(text.tokens)
    size, notes = f"{count} tokens, {len(windows)} windows of {length}", list(text.notes)
    if not windows:
        if count < 2:
            raise DataError(
                f"{source.name} is too short for a sample: it has {count} tokens, and the first predicts the second; "
                "use more text"
            )
        windows = [text.whole()]
        notes.append(f"{source.name} is shorter than a window of {length}: its {count} tokens are the only sample")
    return _Pool(windows, size, notes)


def _choose(
    sources: Sequence[Source], pools: Sequence[_Pool], count: int | None, reserve: int, seed: int | None
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], list[str]]:
    """Return samples in proportion to the weights, the ones held out behind them, and notes on missing ones."""
    weights, available = [source.weight for source in sources], [len(pool.samples) for pool in pools]
    reserved = quotas(reserve, weights)
    held = [min(wanted, have // 2) for wanted, have in zip(reserved, available, strict=True)]
    free = [have - own for have, own in zip(available, held, strict=True)]
    numbers = quotas(largest_mixture(free, weights) if count is None else count, weights)
    chosen, kept, notes = list[list[Tensor]](), list[list[Tensor]](), list[str]()
    for source, pool, wanted, own, most, asked in zip(sources, pools, numbers, held, free, reserved, strict=True):
        number = min(wanted, most)
        windows = pool.samples
        if seed is not None:
            order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
            windows = [windows[index] for index in order.tolist()]
        # Clones: a window is a view of all tokens, and would keep them in memory.
        windows = [window.clone() for window in windows[: number + own]]
        chosen.append(windows[:number])
        kept.append(windows[number:])
        if number < wanted or own < asked or number == 0:
            notes.append(_shortage(source.name, pool.size, number, wanted, own, asked))
    return tuple(interleave(chosen)), tuple(interleave(kept)), notes


def _shortage(name: str, size: str, number: int, wanted: int, held: int, reserved: int) -> str:
    taken = f"{number} of {wanted} samples" if number < wanted else f"{number} samples"
    if not wanted:
        return f"{name} gives no sample: its weight is too small for one"
    out = f", and {held} of {reserved} to hold out" if held < reserved else ""
    return f"{name} gives {taken}{out}: it has {size}"
