"""Load the tokenizer of a model folder, without running code from the folder."""

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
    """Load the tokenizer in `folder`; code in the folder is never run.

    Raises:
        DataError: the folder has no tokenizer files, or they cannot be used.
    """
    from transformers import AutoTokenizer  # imported late: it takes time, and ready token ids need no tokenizer

    lacking = DataError(f"{folder} lacks tokenizer files, so text cannot be turned into tokens: {WAY_OUT}")
    # Without files transformers still builds some classes, with an empty vocabulary, which encode any text as nothing.
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
    """Turn any error inside into one that blames the tokenizer files in `folder`.

    Raises:
        DataError: in place of any other error.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the libraries raise many kinds, and a panic of Rust is not an Exception
        raise DataError(f"the tokenizer files in {folder} cannot be used ({reason(error)}): {WAY_OUT}") from None
