"""Texts on which papers print perplexity, cut into windows as their code cuts them."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hesse.data.offline import without_network
from hesse.data.records import Content
from hesse.data.samples import Samples
from hesse.data.sources import dataset_content, is_dataset_id, read_sources
from hesse.data.tokenizer import load_tokenizer, usable_tokenizer
from hesse.errors import DataError, OptionError, naming


@dataclass(frozen=True)
class Standard:
    """A text of the literature: a data set id with configuration and split, and how papers cut it."""

    data: str
    separator: str  # between the rows of the split
    length: int  # tokens of a window


# GPTQ (Frantar et al., 2022, arXiv:2210.17323) and AWQ (Lin et al., 2023, arXiv:2306.00978), in their code.
STANDARDS = {"wikitext": Standard("Salesforce/wikitext:wikitext-2-raw-v1:test", "\n\n", 2048)}


def standard_samples(
    name: str, data: str | Path | None, tokenizer_folder: Path, count: int | None, length: int | None, limit: int | None
) -> tuple[Samples, list[str]]:
    """Return the windows of a standard text, and notes on what differs from the papers.

    All rows of the split are joined to one text, which the tokenizer encodes in one call with its default special
    tokens; contiguous windows follow one another without overlap, and an incomplete last window is dropped.

    Args:
        name: a key of STANDARDS.
        data: a .txt, .jsonl or .parquet file of the split, or a data set id that is in the local cache; None for the
            standard's own id. Nothing is downloaded.
        tokenizer_folder: the model folder whose tokenizer encodes the text.
        count: number of windows, from the first on; None for all.
        length: tokens of a window; None for the standard's, or the model's positions if these are fewer.
        limit: number of positions of the model; None for no limit.

    Raises:
        OptionError: there is no such standard.
        DataError: the text is missing, not text, or shorter than a window.
    """
    if name not in STANDARDS:
        raise OptionError(f"there is no standard {name!r}; there are {', '.join(STANDARDS)}")
    standard = STANDARDS[name]
    asked = standard.length if length is None else length
    tokens = asked if limit is None else min(asked, limit)
    source, texts = _read_rows(name, standard, data)
    tokenizer = load_tokenizer(tokenizer_folder)
    with usable_tokenizer(tokenizer_folder):
        # Not verbose: it would warn that the text is too long for the model, but it is cut into windows.
        encoded = tokenizer(standard.separator.join(texts), return_tensors="pt", verbose=False)
        ids = encoded["input_ids"].flatten()
    windows = ids[: len(ids) // tokens * tokens].view(-1, tokens)
    if not len(windows):
        raise DataError(f"{source} is too short: its {len(ids)} tokens do not fill one window of {tokens}")
    chosen = windows[:count]
    notes = []
    if tokens != standard.length:
        why = "the model has no more positions" if tokens < asked else "as asked for"
        notes.append(
            f"windows of {tokens} tokens, not {standard.length}: {why}; papers print perplexity at {standard.length}"
        )
    if len(chosen) < len(windows):
        notes.append(f"the first {len(chosen)} of {len(windows)} windows; papers take all")
    return Samples(tuple(window.clone() for window in chosen), source, exact=False), notes


def _read_rows(name: str, standard: Standard, data: str | Path | None) -> tuple[str, list[str]]:
    """Return the name and the rows of the text, empty rows included."""
    chosen = standard.data if data is None else data
    if is_dataset_id(chosen):
        with suppress(ImportError):  # a missing package has a message of its own
            import datasets  # noqa: F401 - its settings exist once it is imported
        with without_network(), naming(f"nothing is downloaded for --standard {name}"):
            return str(chosen), _texts(name, str(chosen), dataset_content(str(chosen), "evaluation"))
    (source, *others) = read_sources(chosen, "evaluation")
    if others:
        raise DataError(f"{chosen} is a mixture: --standard {name} needs one text")
    return source.name, _texts(name, source.name, source.content)


def _texts(name: str, source: str, content: Content) -> list[str]:
    if content.samples or content.chats:
        kind = "token ids" if content.samples else "chats"
        raise DataError(f"{source} holds {kind}: --standard {name} needs the text itself")
    return content.texts
