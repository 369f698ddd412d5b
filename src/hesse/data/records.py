"""Records of data files: text, chats, or token ids, each checked and with its place for error messages."""

import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hesse.curvature.losses import hide_from_loss
from hesse.errors import DataError

# The key that decides how a record is read: the first one that the record has.
KEYS = ("input_ids", "messages", "conversations", "text", "prompt")
COLUMNS = (*KEYS, "completion", "tools", "attention_mask", "labels", "images", "image")  # all that are read
ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function"), "tool"),
    "system": "system",
}
LARGEST_ID = torch.iinfo(torch.int64).max
MASKED = -100  # a label that is not scored, as in torch and transformers


@dataclass(frozen=True)
class Chat:
    """A chat that the tokenizer's template renders to text."""

    place: str
    messages: list[dict[str, Any]]
    tools: list[Any] | None = None


@dataclass(frozen=True)
class TokenRecord:
    """Token ids that are a sample, not checked yet."""

    place: str
    ids: object
    mask: object = None
    labels: object = None

    def sample(self, limit: int | None) -> Tensor:
        """Check the ids, and return them as a tensor (tokens,) int64 without padding.

        Tokens whose label is masked are hidden from the loss: see `hide_from_loss`.

        Raises:
            DataError: ids, mask or labels are wrong, or more than `limit` tokens remain.
        """
        place = self.place
        if not isinstance(self.ids, Sequence) or isinstance(self.ids, str):
            raise DataError(f"{place}: the token ids are {type(self.ids).__name__}, not a list of whole numbers")
        for value in self.ids:
            if type(value) is not int or not 0 <= value <= LARGEST_ID:  # bool is an int, and no token id
                raise DataError(f"{place}: {reprlib.repr(value)} is not a token id; ids are whole numbers from 0")
        kept = self._kept(len(self.ids))
        count = kept.stop - kept.start
        if count < 2:
            raise DataError(f"{place} has {count} token ids: a sample needs at least 2, so remove it or make it longer")
        if limit is not None and count > limit:
            raise DataError(f"{place} has {count} tokens, but the model has positions for {limit}: shorten or split it")
        ids = torch.tensor(self.ids[kept], dtype=torch.int64)
        if self.labels is None:
            return ids
        scored = torch.tensor(self._scored(self.ids)[kept])
        if not bool(scored[1:].any()):
            raise DataError(f"{place}: every label is {MASKED}, so nothing of the sample is scored: remove it")
        return hide_from_loss(ids, scored)

    def _kept(self, count: int) -> slice:
        """Return the tokens that the attention mask keeps."""
        if self.mask is None:
            return slice(0, count)
        mask = _aligned(self.mask, count, "attention_mask", self.place)
        if any(type(value) not in (int, bool) or value not in (0, 1) for value in mask):
            raise DataError(f'{self.place}: the "attention_mask" is not of zeros and ones: correct or remove it')
        if not any(mask):
            raise DataError(f"{self.place} is all padding (its attention_mask is 0): remove it")
        first = mask.index(1)
        last = count - 1 - mask[::-1].index(1)
        if not all(mask[first : last + 1]):
            raise DataError(
                f'{self.place}: the "attention_mask" has zeros between ones: padding stands before or after a sample'
            )
        return slice(first, last + 1)

    def _scored(self, ids: Sequence[int]) -> list[bool]:
        labels = _aligned(self.labels, len(ids), "labels", self.place)
        for value, own in zip(labels, ids, strict=True):
            if type(value) is not int or value not in (MASKED, own):
                raise DataError(
                    f"{self.place}: the label {reprlib.repr(value)} is neither {MASKED} nor the token id {own} in its "
                    "place: give the labels of a causal language model, or remove them"
                )
        return [value != MASKED for value in labels]


def _aligned(values: object, count: int, name: str, place: str) -> list[Any]:
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != count:
        raise DataError(f'{place}: "{name}" is not a list of {count} numbers, one for each token id: correct it')
    return list(values)


@dataclass(frozen=True)
class Content:
    """Content of a source: documents, chats or samples of token ids; exactly one kind of them."""

    texts: list[str] = field(default_factory=list)
    chats: list[Chat] = field(default_factory=list)
    samples: list[TokenRecord] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @staticmethod
    def of(records: Iterable[tuple[str, object]]) -> "Content":
        """Return the content of records by their places.

        Raises:
            DataError: a record is wrong, or of another kind than the first one.
        """
        content, first, kind = Content(), "", ""
        for place, record in records:
            item = _parsed(record, place)
            own = "input_ids" if isinstance(item, TokenRecord) else "text" if isinstance(item, str) else "a chat"
            if not first:
                first, kind = place, own
            elif own != kind:
                raise DataError(f"{place} has {_shown(own)}, but {first} has {_shown(kind)}: use one kind of record")
            if isinstance(item, str):
                content.texts.append(item)
            elif isinstance(item, Chat):
                content.chats.append(item)
            else:
                content.samples.append(item)
        return content

    @property
    def empty(self) -> bool:
        """Return True if there is nothing in it."""
        return not (self.texts or self.chats or self.samples)


def _shown(kind: str) -> str:
    return kind if kind == "a chat" else f'"{kind}"'


def _parsed(record: object, place: str) -> str | Chat | TokenRecord:
    key = next((key for key in KEYS if isinstance(record, Mapping) and key in record), None)
    if not isinstance(record, Mapping) or key is None or (key == "prompt" and "completion" not in record):
        raise DataError(
            f'{place} has neither "text" nor "messages", "conversations", "prompt" with "completion", or "input_ids": '
            "write an object with one of them"
        )
    if any(record.get(name) for name in ("images", "image")):
        raise _images(place)
    if key == "input_ids":
        return TokenRecord(place, record[key], record.get("attention_mask"), record.get("labels"))
    if key == "text":
        return checked_text(record[key], place)
    tools = record.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise DataError(f'{place}: "tools" is {type(tools).__name__}, not a list: correct or remove it')
    if key == "prompt":
        turns = [*_turns(record["prompt"], "prompt", "user", place)]
        turns += _turns(record["completion"], "completion", "assistant", place)
    else:
        turns = _turns(record[key], key, None, place)
    if not turns:
        raise DataError(f'{place}: "{key}" is empty: remove it')
    return Chat(place, turns, tools or None)


def _turns(value: object, key: str, role: str | None, place: str) -> list[dict[str, Any]]:
    """Return the messages of a chat; text is one message of `role`."""
    if isinstance(value, str) and role is not None:
        return [{"role": role, "content": checked_text(value, place, key)}]
    if not isinstance(value, Sequence) or isinstance(value, str):
        kinds = "a list of messages" if role is None else "text or a list of messages"
        raise DataError(f'{place}: "{key}" is {type(value).__name__}, not {kinds}: correct or remove it')
    return [_message(entry, f"{place}, message {number}") for number, entry in enumerate(value, 1)]


def _message(entry: object, place: str) -> dict[str, Any]:
    """Return a message with role and content, from these or from ShareGPT's `from` and `value`."""
    if not isinstance(entry, Mapping):
        raise DataError(f'{place} is {type(entry).__name__}, not an object with "role" and "content": correct it')
    if "role" in entry:
        message = {str(name): value for name, value in entry.items() if value is not None}
        role = message.get("role")
        if not isinstance(role, str):
            raise DataError(f'{place}: "role" is {type(role).__name__}, not a string: correct it')
        if "content" not in message and "tool_calls" not in message:
            raise DataError(f'{place} has no "content": give its text')
    elif "from" in entry and "value" in entry:
        sender = entry["from"]
        known = ROLES.get(sender.lower()) if isinstance(sender, str) else None
        if known is None:
            raise DataError(f'{place} is "from" {reprlib.repr(sender)}: use one of {", ".join(ROLES)}')
        message = {"role": known, "content": entry["value"]}
    else:
        raise DataError(f'{place} has neither "role" and "content" nor "from" and "value": write one of these pairs')
    if "content" in message:
        message["content"] = _message_text(message["content"], place)
    return message


def _message_text(content: object, place: str) -> str:
    """Return the text of a message's content: a string, or a list of parts of the type text."""
    if not isinstance(content, Sequence) or isinstance(content, str):
        return checked_text(content, place, "content")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text":
            if kind in ("image", "image_url", "video", "audio", "input_audio"):
                raise _images(place)
            raise DataError(f'{place}: a part of "content" has no "type" text: give text')
        texts.append(checked_text(part.get("text"), place))
    return "".join(texts)


def _images(place: str) -> DataError:
    return DataError(
        f"{place} has images or sound, and data files are read as text only: leave these out, or give hesse.compress "
        "the model and the processor's batches in Python"
    )


def checked_text(value: object, place: str, key: str = "text") -> str:
    """Return `value` if a tokenizer accepts it.

    Raises:
        DataError: it is no string, or holds half a character.
    """
    if not isinstance(value, str):
        raise DataError(f'{place}: "{key}" is {type(value).__name__}, not a string: correct or remove it')
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON allows and no tokenizer accepts
        raise DataError(f'{place}: "{key}" holds half a character (a lone surrogate): correct or remove it') from None
    return value
