"""Write a byte-level BPE tokenizer as llama.cpp's metadata."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from hesse.checkpoints.files import belongs, read_json
from hesse.data import usable_tokenizer
from hesse.errors import CheckpointError, reason

if TYPE_CHECKING:
    from gguf import GGUFWriter

# llama.cpp's names of pre-tokenizers, by the pattern in tokenizer.json.
CUTS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+": "llama-bpe",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+": "qwen2",
}
GPT2_CUT = "gpt-2"
MALFORMED = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def write_tokenizer(writer: "GGUFWriter", folder: Path, vocabulary: int) -> str | None:
    """Write the tokenizer of the model in `folder`, padded to `vocabulary` tokens; return a note if it is left out.

    Without a tokenizer llama.cpp runs the model on token ids. Links that lead out of the folder are not read.

    Raises:
        CheckpointError: a tokenizer file is damaged.
        DataError: the tokenizers library cannot use the files.
    """
    try:
        return _write(writer, folder, vocabulary)
    except MALFORMED as error:
        raise CheckpointError(
            f"the tokenizer files in {folder} are damaged ({reason(error)}): copy them again"
        ) from None


def _write(writer: "GGUFWriter", folder: Path, vocabulary: int) -> str | None:
    content = _content(folder, "tokenizer.json")
    cut = _cut(content)
    if cut is None:
        writer.add_tokenizer_model("no_vocab")
        writer.add_vocab_size(vocabulary)
        reason = "there is no tokenizer.json" if not content else "it is not a byte-level BPE with a known pattern"
        return f"the tokenizer is left out, since {reason}: llama.cpp runs this file on token ids only"
    from gguf import TokenType  # imported late: optional

    tokens = [f"[PAD{index}]" for index in range(vocabulary)]
    types = [int(TokenType.UNUSED)] * vocabulary
    known = [(index, text, TokenType.NORMAL) for text, index in content["model"]["vocab"].items()]
    for added in content.get("added_tokens", ()):
        known.append((added["id"], added["content"], TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED))
    for index, text, kind in known:
        if 0 <= index < vocabulary:
            tokens[index], types[index] = text, int(kind)
    merges = content["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cut)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    _write_special_tokens(writer, folder, tokens)
    return None


def _cut(content: dict[str, Any]) -> str | None:
    """Return llama.cpp's name of the tokenizer's pre-tokenizer; None if llama.cpp has no such pre-tokenizer."""
    if content.get("model", {}).get("type") != "BPE" or content.get("normalizer") not in (None, {"type": "NFC"}):
        return None
    before = content.get("pre_tokenizer") or {}
    steps = before["pretokenizers"] if before.get("type") == "Sequence" else [before]
    if any(step.get("add_prefix_space") for step in steps):
        return None
    if [step.get("type") for step in steps] == ["ByteLevel"] and steps[0].get("use_regex", True):
        return GPT2_CUT
    if [step.get("type") for step in steps] == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        return CUTS.get(steps[0]["pattern"].get("Regex"))
    return None


def _content(folder: Path, name: str) -> dict[str, Any]:
    """Read a JSON file of the folder; return nothing if it is missing or a link out of the folder."""
    path = folder / name
    return read_json(path) if path.is_file() and belongs(path, folder) else {}


def _write_special_tokens(writer: "GGUFWriter", folder: Path, tokens: list[str]) -> None:
    settings = _content(folder, "tokenizer_config.json")
    ids: dict[str, int] = {}
    adders = {"bos": writer.add_bos_token_id, "eos": writer.add_eos_token_id, "pad": writer.add_pad_token_id}
    for kind, add in adders.items():
        text = settings.get(f"{kind}_token")
        text = text.get("content") if isinstance(text, dict) else text
        if text in tokens:
            ids[kind] = tokens.index(text)
            add(ids[kind])
    # The special tokens that the tokenizer itself adds around a text.
    with usable_tokenizer(folder):
        around = Tokenizer.from_str(json.dumps(_content(folder, "tokenizer.json"))).encode("").ids
    writer.add_add_bos_token(around[:1] == [ids.get("bos")])
    writer.add_add_eos_token(len(around) > 0 and around[-1:] == [ids.get("eos")] and around != [ids.get("bos")])
    template = folder / "chat_template.jinja"
    is_own = template.is_file() and belongs(template, folder)
    chat = template.read_text(encoding="utf-8") if is_own else settings.get("chat_template")
    if isinstance(chat, str):
        writer.add_chat_template(chat)
