"""Render chats to text with a tokenizer's template."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hesse.data.records import Chat, checked_text
from hesse.errors import DataError, reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN = 80  # characters of the first rendered chat


def rendered_chats(chats: Sequence[Chat], tokenizer: "PreTrainedTokenizerBase", folder: Path) -> list[str]:
    """Return the text of each chat, with the special tokens that the template writes.

    Raises:
        DataError: the tokenizer has no template, or the template refuses a chat.
    """
    if not tokenizer.chat_template:
        raise DataError(
            f"{chats[0].place} is a chat, and the tokenizer in {folder} has no chat template: give lines with "
            '"text", or add the chat_template.jinja of the model to its folder'
        )
    texts = []
    for chat in chats:
        try:
            text = tokenizer.apply_chat_template(chat.messages, tools=chat.tools, tokenize=False)
        except (KeyboardInterrupt, SystemExit):
            raise
        except Exception as error:  # whatever a template raises, it means that it does not take this chat
            raise DataError(
                f"{chat.place}: the chat template of {folder} does not take this chat ({reason(error)}): correct it"
            ) from None
        texts.append(checked_text(text, chat.place))
    return texts
