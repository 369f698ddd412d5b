"""Turn documents and chats into tokens, and cut them into windows."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hesse.data.chats import SHOWN, rendered_chats
from hesse.data.records import Content
from hesse.data.special_tokens import SpecialTokens, special_tokens, with_bos
from hesse.data.tokenizer import load_tokenizer, usable_tokenizer
from hesse.errors import OptionError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Documents per tokenizer call: enough to keep all cores busy, few enough to hold as Python lists of ids.
DOCUMENTS_A_CALL = 1024


@dataclass(frozen=True, eq=False)
class TokenisedText:
    """Tokens of all documents in a row."""

    tokens: Tensor  # (tokens,) int64
    start: tuple[int, ...]  # each window starts with these
    notes: tuple[str, ...]

    def windows(self, length: int) -> list[Tensor]:
        """Return all windows of `length` tokens; an incomplete last one is dropped.

        Raises:
            OptionError: a window has no room behind its first tokens.
        """
        tokens, start = self.tokens, torch.tensor(self.start, dtype=torch.int64)
        if not len(start):
            return list(tokens[: len(tokens) // length * length].view(-1, length))
        if length <= len(start):
            raise OptionError(f"the sample length is {length} tokens, and each starts with {len(start)}: use more")
        windows, place = list[Tensor](), 0
        while True:
            own = tokens[place : place + len(start)].equal(start)
            end = place + length - (0 if own else len(start))
            if end > len(tokens):
                return windows
            windows.append(self._started(tokens[place:end]))
            place = end

    def whole(self) -> Tensor:
        """Return all tokens as one window."""
        return self._started(self.tokens)

    def _started(self, window: Tensor) -> Tensor:
        start = torch.tensor(self.start, dtype=torch.int64)
        return window if window[: len(start)].equal(start) else torch.cat([start, window])


def tokenised(content: Content, folder: Path, bos: bool | None) -> TokenisedText:
    """Return the tokens of texts or chats, by the tokenizer in `folder`.

    Each text has the special tokens that the tokenizer adds to a text; `bos` changes the one at its start. A chat is as
    the template renders it, and windows start with BOS if the first chat does.

    Raises:
        DataError: the tokenizer cannot be used, or has no template that takes the chats.
        OptionError: the tokenizer has no BOS.
    """
    tokenizer = load_tokenizer(folder)
    own = special_tokens(tokenizer, folder)
    around = with_bos(own, bos, tokenizer, folder)
    if not content.chats:
        tokens = _text_tokens(content.texts, tokenizer, folder, around)
        return TokenisedText(tokens, around.start, _notes(tokenizer, own, around, bos))
    texts = rendered_chats(content.chats, tokenizer, folder)
    encoded = _encoded(texts, tokenizer, folder)
    tokens = torch.cat(encoded)
    begins = bool(around.start) and encoded[0][: len(around.start)].tolist() == list(around.start)
    start = around.start if begins or bos else ()
    notes = [f"chats are rendered by the tokenizer's template; the first starts with {texts[0][:SHOWN]!r}"]
    if start:
        notes.append(f"each sample starts with {_shown(tokenizer, start)}, as the chat template writes it")
        if not begins:
            notes[-1] = f"each sample starts with {_shown(tokenizer, start)}, as --bos asks"
    elif own.start:
        notes.append(
            f"samples do not start with {_shown(tokenizer, own.start)}, which the tokenizer adds to text: "
            + ("--no-bos" if bos is False else "the chat template writes none")
        )
    return TokenisedText(tokens, start, tuple(notes))


def _text_tokens(
    texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", folder: Path, around: SpecialTokens
) -> Tensor:
    """Return the token ids (tokens,) of all documents, with a separator between each two."""
    documents = [text for text in texts if text]
    joined = not around.end
    separator = [tokenizer.eos_token_id] if joined and tokenizer.eos_token_id is not None else []
    if joined and not separator:
        documents = [text + "\n" for text in documents[:-1]] + documents[-1:]
    before, behind, between = (torch.tensor(x, dtype=torch.int64) for x in (around.start, around.end, separator))
    pieces: list[Tensor] = []
    for ids in _encoded(documents, tokenizer, folder):
        pieces += [before, ids, behind, between]
    return torch.cat(pieces[:-1]) if pieces else torch.empty(0, dtype=torch.int64)


def _encoded(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", folder: Path) -> list[Tensor]:
    """Return the token ids of each text, without special tokens that it does not have."""
    found: list[Tensor] = []
    for start in range(0, len(texts), DOCUMENTS_A_CALL):
        batch = list(texts[start : start + DOCUMENTS_A_CALL])
        # Not verbose: it would warn that a document is too long for the model, but documents are cut into windows.
        with usable_tokenizer(folder):
            encoded = tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
        found += [torch.tensor(ids, dtype=torch.int64) for ids in encoded]
    return found


def _notes(
    tokenizer: "PreTrainedTokenizerBase", own: SpecialTokens, around: SpecialTokens, bos: bool | None
) -> tuple[str, ...]:
    """Return what was added to texts, where it differs from nothing or from what the tokenizer does."""
    notes = []
    if around.start:
        why = "as the tokenizer adds it" if own.start else "as --bos asks"
        notes.append(f"each sample starts with {_shown(tokenizer, around.start)}, {why}")
    elif own.start:
        notes.append(f"samples do not start with {_shown(tokenizer, own.start)}, which the tokenizer adds: --no-bos")
    if around.end:
        notes.append(f"each document ends with {_shown(tokenizer, around.end)}, as the tokenizer adds it")
    return tuple(notes)


def _shown(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> str:
    return " ".join(map(str, tokenizer.convert_ids_to_tokens(list(ids))))
