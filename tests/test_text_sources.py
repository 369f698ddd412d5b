"""Text as it is stored: chats, special tokens, masks, other files, folders and mixtures, held against transformers."""

import csv
import gzip
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import hesse
import tiny_models
from helpers import CommandLine
from hesse.curvature.losses import hide_from_loss, input_ids, next_tokens
from hesse.data import Samples, read_samples
from hesse.data.mixtures import interleave, largest_mixture, quotas
from hesse.data.sources import data_files
from hesse.errors import DataError, OptionError

TEXT = " ".join(f"word{number} is number {number}." for number in range(100))
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is one and one?"},
    {"role": "assistant", "content": "Two."},
]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>\n{% endfor %}"
)
STRICT = (
    "{% if messages[0].role != 'user' %}{{ raise_exception('a chat starts with user') }}{% endif %}"
    "{% for message in messages %}{{ message.content }}{% endfor %}"
)
LENGTH = 16


def make_tokenizer(
    folder: Path, start: str = "", end: str = "", template: str | None = None, bos: str | None = "<bos>"
) -> PreTrainedTokenizerFast:
    """A small tokenizer whose post-processor adds `start` and `end`."""
    bpe = ByteLevelBPETokenizer()
    special = ["<eos>", "<bos>", "<sep>"]
    bpe.train_from_iterator([TEXT], vocab_size=300, special_tokens=special, show_progress=False)
    inner: Tokenizer = bpe._tokenizer  # type: ignore[no-untyped-call]
    if start or end:
        inner.post_processor = TemplateProcessing(
            single=" ".join(filter(None, (start, "$A", end))),
            special_tokens=[(token, inner.token_to_id(token)) for token in (start, end) if token],
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", bos_token=bos, model_max_length=9999)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that adds nothing, with a template."""
    make_tokenizer(path := tmp_path_factory.mktemp("plain"), template=TEMPLATE)
    return path


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that adds BOS, with a template that writes BOS, as those of Gemma and Llama do."""
    make_tokenizer(path := tmp_path_factory.mktemp("gemma"), "<bos>", template=TEMPLATE)
    return path


def read(
    data: Any,
    folder: Path,
    count: int | None = None,
    length: int = LENGTH,
    purpose: Literal["calibration", "evaluation"] = "evaluation",
    **options: Any,
) -> Samples:
    return read_samples(
        data, folder, **{"count": count, "length": length, "seed": 0, "purpose": purpose, "limit": None, **options}
    )[0]


def tokens(samples: Samples) -> list[list[int]]:
    return [ids.tolist() for ids in samples.ids]


def lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def fails(data: Any, folder: Path, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(data, folder, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Special tokens: those of tokenizer(text)


@pytest.mark.parametrize(
    ("start", "end"), [("", ""), ("<bos>", ""), ("", "<eos>"), ("<bos>", "<eos>"), ("<bos>", "<sep>")]
)
def test_a_text_is_what_the_tokenizer_makes_of_it(start: str, end: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "model", start, end)
    (tmp_path / "text.txt").write_text(TEXT)
    samples = read(tmp_path / "text.txt", tmp_path / "model", length=5000)
    assert tokens(samples) == [tokenizer(TEXT)["input_ids"]]
    assert [note for note in samples.notes if "with <" in note] == [
        *([f"each sample starts with {start}, as the tokenizer adds it"] if start else []),
        *([f"each document ends with {end}, as the tokenizer adds it"] if end else []),
    ]


@pytest.mark.parametrize("purpose", ["calibration", "evaluation"])
def test_each_window_starts_with_bos_where_the_tokenizer_adds_it(
    purpose: Literal["calibration", "evaluation"], gemma: Path, tmp_path: Path
) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(gemma)
    bos, *rest = tokenizer(TEXT)["input_ids"]
    (tmp_path / "text.txt").write_text(TEXT)
    samples = tokens(read(tmp_path / "text.txt", gemma, purpose=purpose))
    body = LENGTH - 1
    expected = [[bos, *rest[place : place + body]] for place in range(0, len(rest) - body + 1, body)]
    assert sorted(samples) == sorted(expected)
    assert (samples == expected) is (purpose == "evaluation")


def test_documents_start_and_end_as_the_tokenizer_makes_them(tmp_path: Path) -> None:
    data = lines(tmp_path / "text.jsonl", {"text": "one two"}, {"text": ""}, {"text": "three"})
    for start, end, between in (("", "", "<eos>"), ("<bos>", "", "<eos>"), ("<bos>", "<sep>", ""), ("", "<eos>", "")):
        tokenizer = make_tokenizer(tmp_path / f"{start}{end}", start, end)
        joint = [tokenizer.convert_tokens_to_ids(between)] if between else []
        expected = [*tokenizer("one two")["input_ids"], *joint, *tokenizer("three")["input_ids"]]
        assert tokens(read(data, tmp_path / f"{start}{end}", length=500)) == [expected]


def test_a_window_that_starts_at_a_document_has_one_bos(gemma: Path, tmp_path: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(gemma)
    data = lines(tmp_path / "text.jsonl", {"text": "one"}, {"text": TEXT})
    first, second = tokenizer("one")["input_ids"], tokenizer(TEXT)["input_ids"]
    length = len(first) + 1  # the first document and <eos>
    assert tokens(read(data, gemma, length=length))[:2] == [[*first, 0], second[:length]]


def test_bos_can_be_asked_for_and_left_out(plain: Path, gemma: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    data = tmp_path / "text.txt"
    assert tokens(read(data, plain, bos=True)) == tokens(read(data, gemma)) == tokens(read(data, gemma, bos=True))
    assert tokens(read(data, gemma, bos=False)) == tokens(read(data, plain)) == tokens(read(data, plain, bos=False))
    assert "each sample starts with <bos>, as --bos asks" in read(data, plain, bos=True).notes
    assert "samples do not start with <bos>, which the tokenizer adds: --no-bos" in read(data, gemma, bos=False).notes
    assert read(data, plain).notes == ()


def test_bos_without_meaning_is_refused(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "model", bos=None)
    (tmp_path / "text.txt").write_text(TEXT)
    with pytest.raises(OptionError, match="has no BOS token: leave out --bos"):
        read(tmp_path / "text.txt", tmp_path / "model", bos=True)
    for bos in (True, False):
        with pytest.raises(OptionError, match="token ids, which are used as they are"):
            read([[1, 2, 3]], tmp_path, bos=bos)


def test_the_shipped_tokenizer_adds_nothing() -> None:
    from hesse.checkpoints.locate import DEFAULT_FOLDER

    tokenizer = PreTrainedTokenizerFast.from_pretrained(DEFAULT_FOLDER)
    assert tokenizer(TEXT)["input_ids"] == tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    samples = read(None, DEFAULT_FOLDER, count=1, length=64)
    text = (DEFAULT_FOLDER / "held_out.txt").read_text()
    assert tokens(samples) == [tokenizer(text)["input_ids"][:64]]
    assert samples.notes == ()


# Chats: apply_chat_template

CHATS = [
    {"messages": MESSAGES},
    {
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "What is one and one?"},
            {"from": "gpt", "value": "Two."},
        ]
    },
    {"conversations": MESSAGES},
    {"prompt": MESSAGES[:2], "completion": MESSAGES[2:]},
    {"messages": [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in MESSAGES]},
    {"messages": MESSAGES, "text": "not read", "prompt": "not read", "other": 3},
]


@pytest.mark.parametrize("record", CHATS, ids=range(len(CHATS)))
def test_a_chat_is_what_the_template_makes_of_it(record: dict[str, Any], gemma: Path, tmp_path: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(gemma)
    expected = tokenizer.apply_chat_template(MESSAGES, return_dict=False)
    samples = read(lines(tmp_path / "chats.jsonl", record), gemma, length=500)
    assert tokens(samples) == [expected]
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert f"chats are rendered by the tokenizer's template; the first starts with {text[:80]!r}" in samples.notes
    assert "each sample starts with <bos>, as the chat template writes it" in samples.notes


def test_prompt_and_completion_of_text_are_two_messages(plain: Path, tmp_path: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(plain)
    chat = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two."}]
    data = lines(tmp_path / "chats.jsonl", {"prompt": "One?", "completion": "Two."})
    assert tokens(read(data, plain, length=500)) == [tokenizer.apply_chat_template(chat, return_dict=False)]


def test_chats_follow_one_another_without_a_separator(plain: Path, tmp_path: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(plain)
    one = tokenizer.apply_chat_template(MESSAGES, return_dict=False)
    other = tokenizer.apply_chat_template(MESSAGES[1:], return_dict=False)
    data = lines(tmp_path / "chats.jsonl", {"messages": MESSAGES}, {"messages": MESSAGES[1:]})
    whole = [*one, *other]
    samples = read(data, plain)
    assert tokens(samples) == [whole[place : place + LENGTH] for place in range(0, len(whole) - LENGTH + 1, LENGTH)]


def test_windows_of_chats_start_with_bos_where_the_template_writes_it(gemma: Path, tmp_path: Path) -> None:
    data = lines(tmp_path / "chats.jsonl", {"messages": MESSAGES}, {"messages": MESSAGES[1:]})
    bos = PreTrainedTokenizerFast.from_pretrained(gemma).bos_token_id
    samples = tokens(read(data, gemma))
    assert len(samples) > 2
    assert all(window[0] == bos and window[1] != bos for window in samples)
    make_tokenizer(tmp_path / "other", "<bos>", template=TEMPLATE.removeprefix("{{ bos_token }}"))
    without = read(data, tmp_path / "other")
    assert all(bos not in window for window in tokens(without))
    assert "samples do not start with <bos>, which the tokenizer adds to text: the chat template writes none" in (
        without.notes
    )


def test_a_chat_without_a_template(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "model")
    data = lines(tmp_path / "chats.jsonl", {"messages": MESSAGES})
    message = fails(data, tmp_path / "model")
    assert message.startswith(
        f"{data}, line 1 is a chat, and the tokenizer in {tmp_path / 'model'} has no chat template"
    )


def test_a_chat_that_the_template_refuses(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "model", template=STRICT)
    data = lines(tmp_path / "chats.jsonl", {"messages": MESSAGES[1:]}, {"messages": MESSAGES})
    message = fails(data, tmp_path / "model")
    assert message.startswith(f"{data}, line 2: the chat template of")
    assert "a chat starts with user" in message


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% include 'tokenizer_config.json' %}",
        "{% for %}",
        "{{ range(10**9) | list }}",
    ],
)
def test_a_template_is_rendered_in_a_sandbox(template: str, tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "model", template=template)
    data = lines(tmp_path / "chats.jsonl", {"messages": MESSAGES})
    assert fails(data, tmp_path / "model").startswith(f"{data}, line 1: the chat template of")


BAD_CHATS: list[tuple[Any, str]] = [
    ({"messages": "text"}, '"messages" is str, not a list of messages'),
    ({"messages": []}, '"messages" is empty'),
    ({"messages": ["text"]}, "message 1 is str"),
    ({"messages": [{"role": "user"}]}, 'message 1 has no "content"'),
    ({"messages": [{"role": 3, "content": "a"}]}, '"role" is int'),
    ({"messages": [{"role": "user", "content": 3}]}, '"content" is int, not a string'),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "lone surrogate"),
    ({"messages": [{"role": "user", "content": [3]}]}, 'a part of "content" has no "type" text'),
    ({"messages": [{"role": "user", "content": [{"type": "image", "path": "a.png"}]}]}, "images or sound"),
    ({"conversations": [{"from": "stranger", "value": "a"}]}, "\"from\" 'stranger': use one of"),
    ({"conversations": [{"from": ["user"], "value": "a"}]}, "\"from\" ['user']"),
    ({"conversations": [{"value": "a"}]}, 'neither "role" and "content" nor "from" and "value"'),
    ({"conversations": None}, '"conversations" is NoneType'),
    ({"prompt": "a"}, "has neither"),
    ({"prompt": 3, "completion": "a"}, '"prompt" is int, not text or a list'),
    ({"messages": MESSAGES, "tools": "a"}, '"tools" is str, not a list'),
    ({"messages": MESSAGES, "images": ["a.png"]}, "images or sound"),
    ({"text": "a", "images": ["a.png"]}, "images or sound"),
    ({"text": "a"}, 'has "text", but'),
    ({"input_ids": [1, 2]}, 'has "input_ids", but'),
]


@pytest.mark.parametrize(("record", "reason"), BAD_CHATS)
def test_a_bad_chat_is_named(record: Any, reason: str, plain: Path, tmp_path: Path) -> None:
    data = lines(tmp_path / "chats.jsonl", {"messages": MESSAGES}, record)
    message = fails(data, plain)
    assert message.startswith(f"{data}, line 2")
    assert reason in message


# Masks and labels


def test_padding_is_cut_by_the_mask(tmp_path: Path) -> None:
    ids = [5, 6, 7, 8, 9, 10]
    data = lines(
        tmp_path / "ids.jsonl",
        {"input_ids": [*ids, *[0] * 10], "attention_mask": [1] * 6 + [0] * 10},
        {"input_ids": [0, 0, *ids], "attention_mask": [0, 0, *[1] * 6]},
        {"input_ids": ids, "attention_mask": [True] * 6},
        {"input_ids": ids, "attention_mask": None, "labels": None},
    )
    assert tokens(read(data, tmp_path, limit=6)) == [ids] * 4


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 2**40), min_size=2, max_size=20), st.integers(0, 9), st.integers(0, 9), st.data())
def test_masks_cut_what_is_not_the_sample(ids: list[int], before: int, behind: int, draw: st.DataObject) -> None:
    scored = draw.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)).filter(lambda x: any(x[1:])))
    labels = [own if kept else -100 for own, kept in zip(ids, scored, strict=True)]
    record = {
        "input_ids": [0] * before + ids + [0] * behind,
        "attention_mask": [0] * before + [1] * len(ids) + [0] * behind,
        "labels": [-100] * before + labels + [-100] * behind,
    }
    (sample,) = read([record], Path("nowhere")).ids
    assert input_ids(sample).tolist() == ids
    assert next_tokens(sample[None]).tolist() == [[*labels[1:], -100]]


def test_hidden_tokens_are_the_ids_again() -> None:
    ids = torch.tensor([0, 1, 2**62])
    hidden = hide_from_loss(ids, torch.tensor([False, True, False]))
    assert hidden.tolist() == [-1, 1, -1 - 2**62]
    assert input_ids(hidden).equal(ids)


BAD_MASKS: list[tuple[dict[str, Any], str]] = [
    ({"attention_mask": [1, 1]}, '"attention_mask" is not a list of 4 numbers'),
    ({"attention_mask": 1}, '"attention_mask" is not a list'),
    ({"attention_mask": [1, 1, 2, 1]}, "not of zeros and ones"),
    ({"attention_mask": [1.0, 1, 1, 1]}, "not of zeros and ones"),
    ({"attention_mask": [[1], 1, 1, 1]}, "not of zeros and ones"),
    ({"attention_mask": [0, 0, 0, 0]}, "all padding"),
    ({"attention_mask": [1, 0, 1, 1]}, "zeros between ones"),
    ({"attention_mask": [1, 0, 0, 0]}, "has 1 token ids"),
    ({"labels": [1, 2]}, '"labels" is not a list of 4 numbers'),
    ({"labels": 3}, '"labels" is not a list'),
    ({"labels": [2, 3, 4, 5]}, "the label 2 is neither -100 nor the token id 1"),
    ({"labels": [1, 2, None, 4]}, "the label None"),
    ({"labels": [-100] * 4}, "every label is -100"),
    ({"labels": [1, -100, -100, -100]}, "every label is -100"),
]


@pytest.mark.parametrize(("masks", "reason"), BAD_MASKS)
def test_a_bad_mask_is_named(masks: dict[str, Any], reason: str, tmp_path: Path) -> None:
    data = lines(tmp_path / "ids.jsonl", {"input_ids": [1, 2, 3]}, {"input_ids": [1, 2, 3, 4], **masks})
    message = fails(data, tmp_path)
    assert message.startswith(f"{data}, line 2")
    assert reason in message


# Files

DOCUMENTS = ["The first document.", 'A second "one", with\nlines.', "Third."]


def write(path: Path, documents: Sequence[str] = DOCUMENTS) -> Path:
    """Write documents as the type that a file's name says."""
    if path.name.endswith(".gz"):
        inner = write(path.with_suffix(""), documents)
        path.write_bytes(gzip.compress(inner.read_bytes()))
        inner.unlink()
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.writer(file)
            writer.writerows([("number", "text"), *enumerate(documents)])
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": list(documents), "other": [1] * len(documents)}), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps([{"text": text} for text in documents], indent=1), encoding="utf-8-sig")
    elif path.suffix == ".txt":
        path.write_text("\n".join(documents))
    else:
        lines(path, *({"text": text} for text in documents))
    return path


@pytest.mark.parametrize("name", ["a.json", "a.csv", "a.parquet", "a.jsonl.gz", "a.json.gz", "a.CSV.GZ"])
def test_every_type_of_file_holds_the_same_documents(name: str, plain: Path, tmp_path: Path) -> None:
    if name == "a.CSV.GZ":
        write(tmp_path / "b.csv.gz").rename(tmp_path / name)
    else:
        write(tmp_path / name)
    expected = read(write(tmp_path / "plain.jsonl"), plain, length=500)
    assert read(tmp_path / name, plain, length=500).fingerprint() == expected.fingerprint()


def test_gzipped_text(plain: Path, tmp_path: Path) -> None:
    expected = read(write(tmp_path / "a.txt"), plain, length=500).fingerprint()
    assert read(write(tmp_path / "b.txt.gz"), plain, length=500).fingerprint() == expected


@pytest.mark.parametrize(
    "content",
    [
        '{"text": "a b"}\n{"text": "c d"}\n',
        '["a b", "c d"]',
        '{"data": [{"text": "a b"}, {"text": "c d"}], "version": 1}',
        ' [{"text": "a b"},\n {"text": "c d"}]',
    ],
)
def test_forms_of_json(content: str, plain: Path, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content)
    expected = read(lines(tmp_path / "b.jsonl", {"text": "a b"}, {"text": "c d"}), plain, length=500)
    assert tokens(read(tmp_path / "a.json", plain, length=500)) == tokens(expected)


def test_chats_and_ids_of_parquet_and_data_sets(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chats = {"prompt": ["not read", "not read"], "messages": [MESSAGES, MESSAGES[1:]]}
    expected = tokens(read(lines(tmp_path / "a.jsonl", *({"messages": m} for m in chats["messages"])), plain))
    pyarrow.parquet.write_table(pyarrow.table(chats), tmp_path / "a.parquet")
    assert tokens(read(tmp_path / "a.parquet", plain)) == expected
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_dict(chats))
    assert tokens(read("owner/name", plain)) == expected
    ids = {"input_ids": [[1, 2, 3, 0], [4, 5, 6, 7]], "attention_mask": [[1, 1, 1, 0], [1, 1, 1, 1]]}
    pyarrow.parquet.write_table(pyarrow.table(ids), tmp_path / "ids.parquet")
    assert tokens(read(tmp_path / "ids.parquet", tmp_path)) == [[1, 2, 3], [4, 5, 6, 7]]


def test_a_folder_is_read_file_by_file(plain: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    for name, document in (
        ("b.jsonl", "two"),
        ("a.csv", "one"),
        ("inner/c.jsonl.gz", "three"),
        (".hidden/d.txt", "no"),
    ):
        write(folder / name, [document])
    (folder / "LICENSE").write_text("not read")
    samples = read(folder, plain, length=500)
    expected = read(lines(tmp_path / "all.jsonl", *({"text": t} for t in ("one", "two", "three"))), plain, length=500)
    assert tokens(samples) == tokens(expected)
    assert f"{folder}: 3 files are read, and not LICENSE, of other types" in samples.notes
    assert [path.name for path in data_files(folder)] == ["a.csv", "b.jsonl", "c.jsonl.gz"]
    (folder / "z.jsonl").write_text('{"text": 3}\n')
    assert fails(folder, plain).startswith(f"{folder / 'z.jsonl'}, line 1: ")


BAD_FILES: list[tuple[str, bytes, str]] = [
    ("a.json", b"", "is empty"),
    ("a.json", b"[]", "is empty"),
    ("a.json", b'[{"text": "a"},', "is not valid JSON (Expecting value, line 1"),
    ("a.json", b"{", "is not valid JSON"),
    ("a.json", b"[" * 100_000, "is not valid JSON"),
    ("a.json", b"9" * 5000, "is not valid JSON"),
    ("a.json", b"\xff", "is not UTF-8"),
    ("a.json", b"3", "entry 1 has neither"),
    ("a.json", b'[{"text": "a"}, {"text": 3}]', 'entry 2: "text" is int'),
    ("a.json", b'{"text": "a"}\n{"text": }\n', "line 2 is not valid JSON"),
    ("a.csv", b"", "is empty"),
    ("a.csv", b"text\n", "is empty"),
    ("a.csv", b"body,number\na,1\n", 'has no column "text" (it has body, number)'),
    ("a.csv", b'text\n"open\n', "is not valid CSV"),
    ("a.csv", b"number,text\n1,a\n2\n", 'line 3: "text" is NoneType'),
    ("a.csv", b"text\n\xff\n", "is not UTF-8"),
    ("a.csv", b"input_ids\n1 2 3\n", "the token ids are str"),
    ("a.csv", b"messages\nhello\n", '"messages" is str'),
    ("a.jsonl.gz", b"no gzip", "cannot be read"),
    ("a.jsonl.gz", gzip.compress(b'{"text": "a"}' * 100)[:-20], "cannot be read"),
    ("a.jsonl.gz", gzip.compress(b'{"text": 3}'), "line 1"),
    ("a.txt.gz", gzip.compress(b"\xff"), "is not UTF-8"),
    ("a.jsonl.gz", gzip.compress(b""), "is empty"),
]


@pytest.mark.parametrize(("name", "content", "reason"), BAD_FILES, ids=range(len(BAD_FILES)))
def test_a_bad_file_is_named(name: str, content: bytes, reason: str, plain: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    message = fails(tmp_path / name, plain)
    assert message.startswith(str(tmp_path / name))
    assert reason in message


# Mixtures


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=6))
def test_quotas_sum_and_are_in_proportion(count: int, weights: list[float]) -> None:
    numbers = quotas(count, weights)
    assert sum(numbers) == count
    for number, weight in zip(numbers, weights, strict=True):
        assert abs(number - count * weight / sum(weights)) < 1 + 1e-6


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 500), st.floats(1e-3, 1e3)), min_size=1, max_size=5))
def test_the_largest_mixture_is_available_and_uses_up_a_source(sources: list[tuple[int, float]]) -> None:
    available, weights = [have for have, _ in sources], [weight for _, weight in sources]
    count = largest_mixture(available, weights)
    assert count >= 1
    assert all(need <= have for need, have in zip(quotas(count, weights), available, strict=True))
    more = count + len(sources) + 1
    assert any(more * weight / sum(weights) > have - 1 for have, weight in sources)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=4))
def test_every_beginning_of_a_mixture_is_mixed(sizes: list[int]) -> None:
    parts = [[torch.tensor([index, place]) for place in range(size)] for index, size in enumerate(sizes)]
    mixed = interleave(parts)
    for index, part in enumerate(parts):
        assert [ids[1].item() for ids in mixed if ids[0] == index] == list(range(len(part)))
    for end in range(len(mixed) + 1):
        have = Counter(int(ids[0]) for ids in mixed[:end])
        for index, size in enumerate(sizes):
            assert abs(have[index] - end * size / len(mixed) if mixed else 0) <= len(sizes)


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """Two files of token ids, whose samples tell where they are from."""
    return (
        lines(tmp_path / "a.jsonl", *({"input_ids": [1, number]} for number in range(100))),
        lines(tmp_path / "b.jsonl", *({"input_ids": [2, number]} for number in range(10))),
    )


@pytest.mark.parametrize(
    ("data", "count", "expected"),
    [
        ("a.jsonl,b.jsonl:0.25", 10, {1: 8, 2: 2}),
        ("a.jsonl:3,b.jsonl:1", 8, {1: 6, 2: 2}),
        ("a.jsonl, b.jsonl", 4, {1: 2, 2: 2}),
        ("a.jsonl:1e1,b.jsonl", None, {1: 100, 2: 10}),
        ("a.jsonl,b.jsonl", None, {1: 10, 2: 10}),
    ],
)
def test_a_mixture_has_its_sources_by_weight(
    data: str, count: int | None, expected: dict[int, int], two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(two[0].parent)
    samples = read(data, Path("nowhere"), count=count)
    assert Counter(ids[0] for ids in tokens(samples)) == expected
    assert samples.notes == ()


def test_a_mixture_follows_the_seed(two: tuple[Path, Path]) -> None:
    data = f"{two[0]},{two[1]}:0.25"
    one, again, other = (
        read(data, Path("nowhere"), 10, purpose="calibration", seed=seed).fingerprint() for seed in (1, 1, 2)
    )
    assert one == again != other


def test_held_out_samples_of_a_mixture_are_of_all_sources_and_not_calibrated_on(two: tuple[Path, Path]) -> None:
    data = f"{two[0]},{two[1]}"
    samples, held = read_samples(
        data, Path("nowhere"), count=8, length=8, seed=0, purpose="calibration", limit=None, reserve=4
    )
    assert Counter(ids[0] for ids in tokens(held)) == {1: 2, 2: 2}
    both = tokens(samples) + tokens(held)
    assert len({tuple(ids) for ids in both}) == len(both) == 12


def test_a_mixture_says_what_a_source_lacks(two: tuple[Path, Path]) -> None:
    samples = read(f"{two[0]},{two[1]}", Path("nowhere"), 40)
    assert Counter(ids[0] for ids in tokens(samples)) == {1: 20, 2: 10}
    assert samples.notes == (f"{two[1]} gives 10 of 20 samples: it has 10 samples of token ids",)
    few = read(f"{two[0]},{two[1]}:0.001", Path("nowhere"), 4)
    assert few.notes == (f"{two[1]} gives no sample: its weight is too small for one",)


def test_text_and_chats_and_ids_are_mixed(plain: Path, tmp_path: Path, two: tuple[Path, Path]) -> None:
    write(tmp_path / "text.txt", [TEXT])
    lines(tmp_path / "chats.jsonl", *[{"messages": MESSAGES}] * 20)
    samples = read(f"{tmp_path / 'text.txt'},{tmp_path / 'chats.jsonl'},{two[0]}", plain, 30)
    assert len(samples.ids) == 30
    assert sum(len(ids) == 2 for ids in samples.ids) == 10
    assert sum(len(ids) == LENGTH for ids in samples.ids) == 20


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("a.jsonl,", "a part without a name"),
        ("a.jsonl,:0.3", "a part without a name"),
        ("a.jsonl,a.jsonl:2", "names a.jsonl twice"),
        ("a.jsonl,b.jsonl:0", "weight of b.jsonl"),
        ("a.jsonl,b.jsonl:-1", "weight of b.jsonl"),
        ("a.jsonl,b.jsonl:nan", "weight of b.jsonl"),
        ("a.jsonl,b.jsonl:inf", "weight of b.jsonl"),
        ("a.jsonl,b.jsonl:1e999", "weight of b.jsonl"),
        ("a.jsonl,b.jsonl:1.2.3", "weight of b.jsonl"),
        ("a.jsonl,missing.jsonl:0.3", "missing.jsonl does not exist"),
    ],
)
def test_a_bad_mixture(data: str, reason: str, two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(two[0].parent)
    assert reason in fails(data, Path("nowhere"))


def test_a_file_with_a_comma_in_its_name_is_a_file(plain: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "a,b:0.3.jsonl")
    assert read(str(data), plain, length=500).source == str(data)


# Commands


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model whose tokenizer adds BOS and has a template."""
    folder = tiny_models.save("llama", tmp_path_factory.mktemp("model") / "model", vocab_size=320)
    make_tokenizer(folder, "<bos>", template=TEMPLATE)
    return folder


def test_commands_say_what_text_became(model: Path, tmp_path: Path, hesse_command: CommandLine) -> None:
    chats = lines(tmp_path / "chats.jsonl", *[{"messages": MESSAGES}] * 20)
    short = write(tmp_path / "short.txt", [TEXT])
    ran = hesse_command("compress", model, tmp_path / "a", "--bits", "4", "--group-size", "32", "--data", chats)
    assert ran.code == 0, ran.stderr
    printed = " ".join(ran.stdout.split())
    assert "chats are rendered by the tokenizer's template; the first starts with '<bos><|system|>Be brief." in printed
    assert "chats.jsonl gives" in printed
    ran = hesse_command("evaluate", model, "--data", short, "--length", "32")
    assert "each sample starts with <bos>, as the tokenizer adds it" in " ".join(ran.stdout.split())
    ran = hesse_command("evaluate", model, "--data", short, "--length", "32", "--no-bos", "--json")
    report = json.loads(ran.stdout)
    assert report["notes"] == ["samples do not start with <bos>, which the tokenizer adds: --no-bos"]
    assert report["model_loss"] != hesse.evaluate(model, data=short, length=32).report.model_loss
    assert report["model_loss"] == hesse.evaluate(model, data=short, length=32, bos=False).report.model_loss


def test_a_short_text_needs_no_number_of_samples(model: Path, tmp_path: Path) -> None:
    short = write(tmp_path / "short.txt", ["word1 is number 1. " * 9])
    options = hesse.Options(bits=4, group_size=32)
    report = hesse.compress(model, tmp_path / "out", options=options, data=short).report
    assert report.calibration["samples"] == 1
    assert report.loss.held_out is False
    assert any("short.txt is shorter than a window" in note for note in report.notes)
    assert any(re.search(r"short.txt gives 1 of 128 samples, and 0 of \d+ to hold out", note) for note in report.notes)
    with pytest.raises(DataError, match="gives one sample, and the spread of two is needed"):
        hesse.inspect(model, data=short)


def test_statistics_remember_bos_and_the_mixture(model: Path, tmp_path: Path) -> None:
    options = hesse.Options(bits=4, group_size=32)
    data = f"{write(tmp_path / 'a.txt', [TEXT])},{write(tmp_path / 'b.jsonl', [TEXT[::-1]])}:0.5"
    given: dict[str, Any] = {"data": data, "length": 32, "samples": 12, "bos": False}
    hesse.estimate(model, tmp_path / "statistics", **given)
    again = hesse.compress(model, tmp_path / "a", options=options, statistics=tmp_path / "statistics").report
    assert again.calibration["source"] == ", ".join(str(tmp_path / name) for name in ("a.txt", "b.jsonl"))
    assert any("--no-bos" in note for note in again.notes)


def test_a_run_is_not_resumed_with_another_file_of_a_folder(model: Path) -> None:
    from hesse.jobs.identity import _data

    with TemporaryDirectory() as name:
        folder = Path(name)
        before = _data(str(write(folder / "a.txt", ["one"])))
        assert before != _data(str(write(folder / "a.txt", ["two"])))
        for data in (str(folder), f"{folder / 'a.txt'},{write(folder / 'b.txt', ['one'])}:2"):
            write(folder / "a.txt", ["one"])
            before = _data(data)
            assert before == _data(data)
            write(folder / "a.txt", ["two"])
            assert before != _data(data)
