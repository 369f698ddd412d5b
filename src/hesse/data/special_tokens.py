"""Special tokens around a text: those that the tokenizer's own post-processor adds, or BOS as the user asks."""

from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from hesse.data.tokenizer import usable_tokenizer
from hesse.errors import OptionError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE = "a"
PROBES = 100  # tokens of the vocabulary that are tried if that is none


@dataclass(frozen=True)
class SpecialTokens:
    """Token ids before and behind each text."""

    start: tuple[int, ...] = ()
    end: tuple[int, ...] = ()


def special_tokens(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> SpecialTokens:
    """Return the tokens that `tokenizer(text)` adds to the tokens of a text."""
    with usable_tokenizer(folder):
        probes = [PROBE, *islice(tokenizer.get_vocab(), PROBES)]  # some vocabularies have no token for a letter
        encoded = (list(tokenizer(probe, add_special_tokens=False)["input_ids"]) for probe in probes)
        probe, plain = next(((text, ids) for text, ids in zip(probes, encoded, strict=False) if ids), ("", []))
        whole = list(tokenizer(probe)["input_ids"])
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return SpecialTokens(tuple(whole[:start]), tuple(whole[start + len(plain) :]))
    return SpecialTokens()


def with_bos(own: SpecialTokens, bos: bool | None, tokenizer: "PreTrainedTokenizerBase", folder: Path) -> SpecialTokens:
    """Return `own` with BOS at the start if `bos` is true, without if it is false, and as it is if it is None.

    Raises:
        OptionError: the tokenizer has no BOS.
    """
    if bos is None or (bos and own.start):
        return own
    if not bos:
        return replace(own, start=())
    if tokenizer.bos_token_id is None:
        raise OptionError(f"the tokenizer in {folder} has no BOS token: leave out --bos")
    return replace(own, start=(int(tokenizer.bos_token_id),))
