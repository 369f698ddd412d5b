"""Samples: every source, every error, and what is promised of their order."""

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from hesse.data import Samples, read_samples
from hesse.data import sources as sources_module
from hesse.data import windows as windows_module
from hesse.data.selection import Calibration
from hesse.errors import DataError, OptionError

# Numbered words, so that no two windows are alike.
TEXT = " ".join(f"word{number} is number {number}." for number in range(200))
DOCUMENTS = ["The first document.", "A second one, longer than the first.", "Third."]


def make_tokenizer(folder: Path, eos: str | None) -> PreTrainedTokenizerFast:
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([TEXT, *DOCUMENTS], vocab_size=300, special_tokens=["<eos>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=eos, model_max_length=16)  # type: ignore[no-untyped-call]
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(path, "<eos>")
    return path


@pytest.fixture(scope="module")
def encode(folder: Path) -> Callable[[str], list[int]]:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return lambda text: list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


@pytest.fixture(scope="module")
def joined(encode: Callable[[str], list[int]]) -> list[int]:
    """The tokens of DOCUMENTS with the end-of-sequence token, 0, between them."""
    first, second, third = map(encode, DOCUMENTS)
    return [*first, 0, *second, 0, *third]


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "some.txt"
    path.write_text(TEXT)
    return path


def read(
    data: Any,
    folder: Path,
    count: int | None = None,
    length: int = 8,
    seed: int = 0,
    purpose: Literal["calibration", "evaluation"] = "evaluation",
    limit: int | None = None,
    reserve: int = 0,
) -> tuple[Samples, Samples]:
    return read_samples(
        data, folder, count=count, length=length, seed=seed, purpose=purpose, limit=limit, reserve=reserve
    )


def tokens(samples: Samples) -> list[list[int]]:
    return [ids.tolist() for ids in samples.ids]


def windows(ids: list[int], length: int) -> list[list[int]]:
    return [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]


def write_jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_parquet(path: Path, columns: dict[str, list[Any]]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


# Sources


def test_a_text_file_gives_consecutive_windows_and_drops_the_last_partial_one(
    text_file: Path, folder: Path, encode: Callable[[str], list[int]]
) -> None:
    samples, reserved = read(text_file, folder)
    ids = encode(TEXT)
    assert len(ids) % 8, "the last window must be partial for this test to mean something"
    assert tokens(samples) == windows(ids, 8)
    assert all(ids.dtype == torch.int64 for ids in samples.ids)
    assert (samples.source, samples.exact, reserved.ids) == (str(text_file), False, ())


def test_evaluation_takes_the_first_windows(text_file: Path, folder: Path, encode: Callable[[str], list[int]]) -> None:
    assert tokens(read(str(text_file), folder, count=3)[0]) == windows(encode(TEXT), 8)[:3]


def test_a_byte_order_mark_is_no_text(tmp_path: Path, folder: Path) -> None:
    plain, marked = tmp_path / "plain.TXT", tmp_path / "marked.txt"
    plain.write_text(TEXT, encoding="utf-8")
    marked.write_text(TEXT, encoding="utf-8-sig")
    assert read(plain, folder)[0].fingerprint() == read(marked, folder)[0].fingerprint()


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "dataset"])
def test_documents_are_joined_by_the_end_of_sequence_token(
    kind: str, tmp_path: Path, folder: Path, joined: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = ["", *DOCUMENTS]  # an empty document adds no separator
    data: str | Path = "owner/name"
    if kind == "jsonl":
        data = write_jsonl(tmp_path / "some.jsonl", [{"text": text, "other": 1} for text in documents])
    elif kind == "parquet":
        data = write_parquet(tmp_path / "some.parquet", {"other": [1, 2, 3, 4], "text": documents})
    else:
        made = datasets.Dataset.from_dict({"text": documents})
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: made)
    samples, _ = read(data, folder, length=len(joined))
    assert tokens(samples) == [joined]
    assert samples.source == str(data)


def test_documents_beyond_one_call_of_the_tokenizer(
    tmp_path: Path, folder: Path, joined: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows_module, "DOCUMENTS_A_CALL", 2)
    data = write_jsonl(tmp_path / "some.jsonl", [{"text": text} for text in DOCUMENTS])
    assert tokens(read(data, folder, length=len(joined))[0]) == [joined]


def test_without_an_end_of_sequence_token_a_newline_joins(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "tokenizer", None)
    data = write_jsonl(tmp_path / "some.jsonl", [{"text": text} for text in DOCUMENTS])
    (sample,) = read(data, tmp_path / "tokenizer", length=1000)[0].ids
    assert tokenizer.decode(sample.tolist()) == "\n".join(DOCUMENTS)


def test_a_line_of_jsonl_ends_only_at_a_newline(tmp_path: Path, folder: Path) -> None:
    data = tmp_path / "some.jsonl"
    data.write_text('{"text": "one \u2028 two \x85 three"}\r\n\n{"text": "four"}', encoding="utf-8")
    (sample,) = read(data, folder, length=1000)[0].ids
    assert "four" in PreTrainedTokenizerFast.from_pretrained(folder).decode(sample)


@pytest.mark.parametrize(
    ("name", "purpose", "expected"),
    [
        ("owner/name", "calibration", ("owner/name", None, "train")),
        ("owner/name", "evaluation", ("owner/name", None, "test")),
        ("owner/name-2.0:part:dev[:1%]", "evaluation", ("owner/name-2.0", "part", "dev[:1%]")),
        ("owner/name-2.0:part:dev", "evaluation", ("owner/name-2.0", "part", "dev")),
        ("owner/name:part", "evaluation", ("owner/name", "part", "test")),
        ("owner/name::validation", "calibration", ("owner/name", None, "validation")),
    ],
)
def test_a_data_set_id_says_repository_config_and_split(
    name: str,
    purpose: Literal["calibration", "evaluation"],
    expected: tuple[str, str | None, str],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def load_dataset(repository: str, config: str | None, split: str) -> datasets.Dataset:
        asked.append((repository, config, split))
        return datasets.Dataset.from_dict({"text": [TEXT]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    read(name, folder, purpose=purpose)
    assert asked == [expected]


@pytest.mark.parametrize("data", [None, "default"])
def test_the_shipped_text_is_chosen_by_purpose(
    data: str | None,
    tmp_path: Path,
    folder: Path,
    encode: Callable[[str], list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "calibration.txt").write_text("Some words to calibrate on.")
    (tmp_path / "held_out.txt").write_text("Other words to evaluate on.")
    monkeypatch.setattr(sources_module, "DEFAULT_FOLDER", tmp_path)
    calibration, _ = read(data, folder, purpose="calibration", length=2)
    evaluation, _ = read(data, folder, purpose="evaluation", length=2)
    assert sorted(tokens(calibration)) == sorted(windows(encode("Some words to calibrate on."), 2))
    assert tokens(evaluation) == windows(encode("Other words to evaluate on."), 2)
    assert calibration.source == "default calibration text"
    assert evaluation.source == "default held-out text"


@pytest.mark.parametrize("purpose", ["calibration", "evaluation"])
def test_exact_ids_of_a_file_are_untouched(purpose: Literal["calibration", "evaluation"], tmp_path: Path) -> None:
    ids = [[5, 4, 3], [1, 2], [7, 7, 7, 7], [0, 9, 0]]
    data = write_jsonl(tmp_path / "some.jsonl", [{"input_ids": line, "text": "not read"} for line in ids])
    # No tokenizer is there, the length is above the limit, the count below the lines: none of it matters.
    samples, reserved = read(data, tmp_path, count=1, length=512, purpose=purpose, limit=4, reserve=3)
    assert tokens(samples) == ids
    assert samples.exact
    assert reserved.ids == ()


def test_exact_ids_of_lists_are_untouched(tmp_path: Path) -> None:
    samples, reserved = read([[5, 4, 3], (1, 2)], tmp_path, count=1)
    assert tokens(samples) == [[5, 4, 3], [1, 2]]
    assert samples.exact
    assert reserved.ids == ()


# Order, and what is held out


def test_calibration_windows_follow_the_seed(text_file: Path, folder: Path) -> None:
    one, again, other = (read(text_file, folder, seed=seed, purpose="calibration")[0] for seed in (1, 1, 2))
    assert one.fingerprint() == again.fingerprint()
    assert tokens(one) != tokens(other)
    assert sorted(tokens(one)) == sorted(tokens(other)) == sorted(tokens(read(text_file, folder)[0]))
    fewer, _ = read(text_file, folder, count=5, seed=1, purpose="calibration")
    assert tokens(fewer) == tokens(one)[:5]


def test_reserved_windows_are_not_calibrated_on(text_file: Path, folder: Path) -> None:
    everything = tokens(read(text_file, folder)[0])
    for count in (10, None):
        samples, reserved = read(text_file, folder, count=count, purpose="calibration", reserve=4)
        assert len(samples.ids) == (count or len(everything) - 4)
        assert len(reserved.ids) == 4
        both = tokens(samples) + tokens(reserved)
        assert all(window in everything for window in both)
        assert len({tuple(window) for window in both}) == len(both)


def test_samples_do_not_keep_the_whole_text_in_memory(text_file: Path, folder: Path) -> None:
    samples, _ = read(text_file, folder, count=1)
    assert samples.ids[0].untyped_storage().nbytes() == 8 * 8


def test_text_of_less_than_one_window_is_evaluated_as_one(
    tmp_path: Path, folder: Path, encode: Callable[[str], list[int]]
) -> None:
    data = tmp_path / "short.txt"
    data.write_text("few words")
    for count in (None, 1, 2):
        for purpose in ("calibration", "evaluation"):
            samples, held = read(data, folder, length=100, count=count, purpose=purpose, reserve=2)  # type: ignore[arg-type]
            assert tokens(samples) == [encode("few words")]
            assert held.ids == ()
            assert any("are the only sample" in note for note in samples.notes)
    data.write_text("f")
    with pytest.raises(DataError, match="too short for a sample: it has 1 tokens"):
        read(data, folder, length=100)


def test_no_warning_of_long_text(
    text_file: Path, folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.WARNING, logger="transformers"):
        read(text_file, folder)
    assert "longer than" not in caplog.text


# Batches and fingerprints


def test_only_samples_of_equal_length_share_a_batch() -> None:
    ids = [[1, 1], [2, 2, 2], [3, 3], [4, 4], [5, 5, 5], [6, 6]]
    samples = Samples(tuple(map(torch.tensor, ids)), "ids", exact=True)
    assert [batch.tolist() for batch in samples.batches(3)] == [
        [[1, 1], [3, 3], [4, 4]],
        [[6, 6]],
        [[2, 2, 2], [5, 5, 5]],
    ]
    assert [batch.shape for batch in samples.batches(100)] == [(4, 2), (2, 3)]
    assert Samples((), "none", exact=True).batches(4) == []
    with pytest.raises(OptionError, match="batch size is 0"):
        samples.batches(0)


def test_a_fingerprint_is_of_lengths_and_tokens_alone() -> None:
    def fingerprint(*ids: list[int], source: str = "ids") -> str:
        return Samples(tuple(map(torch.tensor, ids)), source, exact=True).fingerprint()

    assert fingerprint([1, 2], [3]) == fingerprint([1, 2], [3], source="elsewhere")
    different = [fingerprint([1, 2], [3]), fingerprint([1], [2, 3]), fingerprint([3], [1, 2]), fingerprint([1, 2, 3])]
    assert len(set(different)) == 4
    assert len(different[0]) == 64


# Errors: each in one line, with the place and what to do


def fails(data: Any, folder: Path, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(data, folder, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": "unfinished', "is not valid JSON (Unterminated string starting at, column 10)"),
        ("\x80", "is not valid JSON ('utf-8' codec"),
        pytest.param("[" * 100_000, "is not valid JSON", id="nested"),
        ('{"words": "none"}', 'has neither "text" nor'),
        ('"text"', 'has neither "text" nor'),
        ('{"text": "other kind"}', 'has "text", but'),
        ('{"input_ids": "1, 2"}', "the token ids are str, not a list"),
        ('{"input_ids": null}', "the token ids are NoneType, not a list"),
        ('{"input_ids": [1, 2.0]}', "2.0 is not a token id"),
        ('{"input_ids": [1, true]}', "True is not a token id"),
        ('{"input_ids": [[1, 2], [3]]}', "[1, 2] is not a token id"),
        ('{"input_ids": [1, -100]}', "-100 is not a token id"),
        ('{"input_ids": [1, 9223372036854775808]}', "9223372036854775808 is not a token id"),
        ('{"input_ids": []}', "has 0 token ids"),
        ('{"input_ids": [1]}', "has 1 token ids"),
        ('{"input_ids": [1, 2, 3, 4, 5]}', "has 5 tokens, but the model has positions for 4"),
    ],
)
def test_a_bad_line_of_ids_is_named(line: str, reason: str, tmp_path: Path) -> None:
    data = tmp_path / "some.jsonl"
    data.write_bytes(b'{"input_ids": [1, 2, 3]}\n\n' + line.encode("latin-1") + b"\n")
    message = fails(data, tmp_path, limit=4)
    assert message.startswith(f"{data}, line 3")
    assert reason in message


@pytest.mark.parametrize(
    ("value", "reason"), [(5, "int, not a string"), (None, "NoneType, not a string"), ("\ud800", "lone surrogate")]
)
def test_a_bad_text_is_named(value: object, reason: str, tmp_path: Path, folder: Path) -> None:
    message = fails(write_jsonl(tmp_path / "some.jsonl", [{"text": "good"}, {"text": value}]), folder)
    assert "some.jsonl, line 2" in message
    assert reason in message


def test_mixed_lines_in_the_other_order(tmp_path: Path, folder: Path) -> None:
    data = write_jsonl(tmp_path / "some.jsonl", [{"text": "words"}, {"input_ids": [1, 2]}])
    message = fails(data, folder)
    assert 'line 2 has "input_ids", but' in message
    assert 'line 1 has "text": use one kind of record' in message


def test_a_bad_list_of_ids_is_named(tmp_path: Path) -> None:
    assert "sample 2: 'b' is not a token id" in fails([[1, 2], ["b", 3]], tmp_path)
    assert "sample 1: the token ids are int" in fails([1, 2], tmp_path)
    assert "sample 1: the token ids are str" in fails(["some text"], tmp_path)
    assert "list of token ids is empty" in fails([], tmp_path)


@pytest.mark.parametrize(
    "name", ["missing.txt", "folder/missing.jsonl", "/nowhere/name", "wikitext", "~no_such_user/some.txt"]
)
def test_a_missing_file(name: str, folder: Path) -> None:
    assert fails(name, folder).startswith(f"{name} does not exist")


def test_a_path_object_is_never_a_data_set_id(folder: Path) -> None:
    assert "owner/name does not exist" in fails(Path("owner/name"), folder)


@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl", "empty.parquet"])
def test_an_empty_file(name: str, tmp_path: Path, folder: Path) -> None:
    if name.endswith("parquet"):
        write_parquet(tmp_path / name, {"text": []})
    else:
        (tmp_path / name).write_text(" \n\n")
    assert f"{name} is empty" in fails(tmp_path / name, folder)


def test_files_of_other_kinds(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "some.doc").write_text(TEXT)
    assert "extension .doc: give a .txt, .jsonl, .json, .csv or .parquet file" in fails(tmp_path / "some.doc", folder)
    (tmp_path / "some").write_text(TEXT)
    assert "extension (none)" in fails(tmp_path / "some", folder)
    (tmp_path / "some.parquet.gz").write_text(TEXT)
    assert "extension .gz" in fails(tmp_path / "some.parquet.gz", folder)
    (tmp_path / "some.parquet.gz").unlink()
    assert "is a folder without data files" in fails(tmp_path, folder)


def test_text_that_is_not_utf8(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "some.txt").write_bytes("déjà".encode("latin-1"))
    assert "is not UTF-8 text (byte 1)" in fails(tmp_path / "some.txt", folder)


def test_a_file_that_cannot_be_read(text_file: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert "some.txt cannot be read: [Errno 13] Permission denied" in fails(text_file, folder)


def test_bad_parquet(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "some.parquet"
    write_parquet(data, {"body": ["words"], "number": [1]})
    assert 'no column "text" (it has body, number)' in fails(data, folder)
    write_parquet(data, {"text": ["words", None]})
    assert "some.parquet, row 2" in fails(data, folder)
    data.write_bytes(b"PAR1 and then nothing of the kind")
    assert "not a readable .parquet file" in fails(data, folder)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pyarrow is not installed: pip install 'hesse[data]'" in fails(data, folder)


def test_a_data_set_that_cannot_be_had(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("the hub is out of reach\nand more lines")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    message = fails("owner/name", folder)
    assert "owner/name is not a file here" in message
    assert "the hub is out of reach" in message
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_dict({"body": ["words"]}))
    assert 'no column "text" (it has body)' in fails("owner/name", folder)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_dict({"text": []}))
    assert "owner/name is empty" in fails("owner/name", folder)
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "package datasets is not installed" in fails("owner/name", folder)


def test_a_missing_shipped_text(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources_module, "DEFAULT_FOLDER", tmp_path)
    assert "default held-out text is missing from this installation" in fails(None, folder)


@pytest.mark.parametrize("files", [{}, {"config.json": '{"model_type": "gpt2"}', "tokenizer_config.json": "{}"}])
def test_a_folder_without_a_tokenizer(files: dict[str, str], tmp_path: Path, text_file: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for name, text in files.items():
        (model / name).write_text(text)
    message = fails(text_file, model)
    assert f"{model} lacks tokenizer files" in message
    assert ".jsonl file with input_ids" in message


def test_a_damaged_tokenizer(tmp_path: Path, text_file: Path) -> None:
    make_tokenizer(tmp_path / "model", "<eos>")
    (tmp_path / "model" / "tokenizer.json").write_text('{"version": ')
    assert "cannot be used" in fails(text_file, tmp_path / "model")


@pytest.mark.parametrize("reserve", [0, 1])
def test_fewer_samples_than_asked_for(
    reserve: int, text_file: Path, folder: Path, encode: Callable[[str], list[int]]
) -> None:
    have = len(encode(TEXT))
    number = have // 8
    samples, held = read(text_file, folder, count=number + 5, purpose="calibration", reserve=reserve)
    assert sorted(tokens(samples) + tokens(held)) == sorted(windows(encode(TEXT), 8))
    assert len(held.ids) == reserve
    assert samples.notes == (
        f"{text_file} gives {number - reserve} of {number + 5} samples: it has {have} tokens, {number} windows of 8",
    )
    enough, _ = read(text_file, folder, count=number - reserve, purpose="calibration", reserve=reserve)
    assert enough.notes == ()


def test_one_window_is_calibrated_on_and_not_held_out(
    text_file: Path, folder: Path, encode: Callable[[str], list[int]]
) -> None:
    have = len(encode(TEXT))
    samples, held = read(text_file, folder, length=have, count=1, purpose="calibration", reserve=2)
    assert tokens(samples) == [encode(TEXT)]
    assert held.ids == ()
    assert "gives 1 samples, and 0 of 2 to hold out" in samples.notes[0]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"length": 1}, "sample length is 1"),
        ({"count": 0}, "0 samples were asked"),
        ({"reserve": -1}, "-1 reserved samples"),
        ({"length": 9, "limit": 8}, "the model has positions for 8"),
    ],
)
def test_options_without_meaning(options: dict[str, int], reason: str, text_file: Path, folder: Path) -> None:
    with pytest.raises(OptionError, match=reason):
        read(text_file, folder, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["seed", "samples", "length", "batch_size"])
def test_a_number_past_64_bits_is_refused(name: str) -> None:
    Calibration(**{name: 2**63 - 1})
    with pytest.raises(OptionError, match="must be at most 9223372036854775807"):
        Calibration(**{name: 2**63})
    with pytest.raises(OptionError, match="must be at least"):
        Calibration(**{name: -1})
