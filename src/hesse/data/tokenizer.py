"""The tokenizer of a model's folder, as data: files that transformers reads with classes of its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hesse.errors import DataError, reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "*.spm")
WAY_OUT = "copy them from the original model, or give a .jsonl file with input_ids, which needs no tokenizer"


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer whose files lie in `folder`; code beside them is never run.

    Raises:
        DataError: there are none, or they cannot be used.
    """
    from transformers import AutoTokenizer  # imported late: it takes time, and ready token ids need no tokenizer

    lacking = DataError(f"{folder} lacks tokenizer files, so text cannot be turned into tokens: {WAY_OUT}")
    # Without files some classes are built nonetheless, with no vocabulary, and turn every text into nothing.
    if not any(path for pattern in FILES for path in folder.glob(pattern)):
        raise lacking
    with usable_tokenizer(folder):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        size = tokenizer.vocab_size
    if not size:
        raise lacking
    return tokenizer


@contextmanager
def usable_tokenizer(folder: Path) -> Iterator[None]:
    """Whatever goes wrong inside is the fault of the tokenizer files in `folder`.

    Raises:
        DataError: something does.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # transformers and tokenizers raise many kinds, and a panic of Rust is no Exception
        raise DataError(f"the tokenizer files in {folder} cannot be used ({reason(error)}): {WAY_OUT}") from None
