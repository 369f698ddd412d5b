"""Perplexity as papers print it, against their loop over what transformers loads; tasks of lm-evaluation-harness."""

import json
import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import hesse
import tiny_models
from helpers import IDS, CommandLine, compress
from hesse.checkpoints.locate import DEFAULT_FOLDER
from hesse.data.offline import without_network
from hesse.errors import DataError, OptionError
from hesse.evaluation.metrics import common_share
from hesse.reporting import evaluation_summary

FolderOf = Callable[[str], Path]
ROWS = ["", " = A title = \n", "", *(DEFAULT_FOLDER / "held_out.txt").read_text(encoding="utf-8")[:60_000].split("\n")]
FIRST = "<s>"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with 4,096 positions, and a tokenizer whose post-processor sets a first token."""
    folder = tiny_models.save("llama", tmp_path_factory.mktemp("llama"), max_position_embeddings=4096)
    add_tokenizer(folder)
    return folder


def add_tokenizer(folder: Path) -> None:
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        ROWS, vocab_size=tiny_models.VOCABULARY, show_progress=False, special_tokens=["<pad>", FIRST]
    )
    bpe._tokenizer.post_processor = TemplateProcessing(single=f"{FIRST} $A", special_tokens=[(FIRST, 1)])
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token=FIRST).save_pretrained(folder)  # type: ignore[no-untyped-call]


def perplexity_of_papers(folder: Path, rows: list[str], length: int = 2048) -> tuple[float, int]:
    """The loop of GPTQ's and AWQ's code, in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    text = AutoTokenizer.from_pretrained(folder)("\n\n".join(rows), return_tensors="pt").input_ids
    count, losses = text.numel() // length, []
    for i in range(count):
        batch = text[:, i * length : (i + 1) * length]
        with torch.no_grad():
            logits = model(batch).logits
        losses.append(nn.CrossEntropyLoss()(logits[0, :-1], batch[0, 1:]).item() * length)
    return math.exp(sum(losses) / (count * length)), count


def write_rows(path: Path, rows: list[str] = ROWS) -> Path:
    if path.suffix == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pytest.importorskip("pyarrow").table({"text": rows}), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    else:
        path.write_text("\n\n".join(rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "txt"])
def test_perplexity_is_that_of_the_papers_loop(kind: str, model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / f"test.{kind}")
    found = hesse.evaluate(model, standard="wikitext", data=data).report
    expected, windows = perplexity_of_papers(model, ROWS)
    assert windows > 5
    assert (found.samples, found.length, found.tokens) == (windows, 2048, windows * 2047)
    assert found.perplexity == pytest.approx(expected, rel=1e-5)
    assert (found.standard, found.notes) == ("wikitext", [])
    console = Console(width=200)
    with console.capture() as capture:
        console.print(evaluation_summary(found))
    assert "wikitext, as papers print it" in capture.get()


def test_a_compressed_model_has_the_perplexity_of_what_transformers_loads(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    compress(model, out, method="rtn", bits=3, group_size=32)
    found = hesse.evaluate(out, reference=model, standard="wikitext", data=write_rows(tmp_path / "a.txt")).report
    assert found.perplexity == pytest.approx(perplexity_of_papers(out, ROWS)[0], rel=1e-4)
    assert found.reference_loss == pytest.approx(math.log(perplexity_of_papers(model, ROWS)[0]), rel=1e-5)


def test_what_differs_from_the_papers_is_said(model: Path, tmp_path: Path, hesse_command: CommandLine) -> None:
    data = write_rows(tmp_path / "test.txt")
    short = tiny_models.save("llama", tmp_path / "short")
    add_tokenizer(short)
    found = hesse.evaluate(short, standard="wikitext", data=data).report
    assert found.length == tiny_models.POSITIONS
    assert found.perplexity == pytest.approx(perplexity_of_papers(short, ROWS, tiny_models.POSITIONS)[0], rel=1e-5)
    assert found.notes == [
        "windows of 128 tokens, not 2048: the model has no more positions; papers print perplexity at 2048"
    ]
    asked = hesse.evaluate(model, standard="wikitext", data=data, length=512, samples=2).report
    assert (asked.length, asked.samples) == (512, 2)
    assert "windows of 512 tokens, not 2048: as asked for" in asked.notes[0]
    assert asked.notes[1].startswith("the first 2 of ")
    ran = hesse_command("evaluate", short, "--standard", "wikitext", "--data", data)
    assert ran.code == 0, ran.stderr
    assert "wikitext" in ran.stdout
    assert "wikitext, as papers print it" not in ran.stdout
    assert "the model has no more positions" in ran.stdout.replace("\n", " ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"standard": "c5"}, "there is no standard 'c5'; there are wikitext"),
        ({"data": IDS}, "--standard wikitext takes a text, not token ids"),
        ({"data": "ids.jsonl"}, "holds token ids: --standard wikitext needs the text itself"),
        ({"data": "short.txt"}, "short.txt is too short: its 3 tokens do not fill one window of 2048"),
        ({"data": "none.txt"}, "none.txt does not exist"),
        ({}, "nothing is downloaded for --standard wikitext: Salesforce/wikitext:wikitext-2-raw-v1:test is not a file"),
        (
            {"data": "nobody/nothing"},
            "for --standard wikitext: nobody/nothing is not a file here, and the split",
        ),
    ],
)
def test_a_text_that_cannot_be_used_is_named(
    options: dict[str, object], message: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ids.jsonl").write_text('{"input_ids": [1, 2, 3]}\n', encoding="utf-8")
    Path("short.txt").write_text("a b", encoding="utf-8")
    with pytest.raises((DataError, OptionError)) as refused:
        hesse.evaluate(model, **{"standard": "wikitext", **options})
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_encoder_has_no_perplexity(family_folder: FolderOf, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="an encoder has no perplexity"):
        hesse.evaluate(family_folder("bert"), standard="wikitext", data=write_rows(tmp_path / "a.txt"))


def test_a_data_set_in_the_local_cache_is_read_without_the_network(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    cached = tmp_path / "cache" / "Salesforce___wikitext" / "wikitext-2-raw-v1" / "0.0.0" / "0123"
    builder = datasets.load_dataset("json", data_files={"test": str(write_rows(tmp_path / "rows.jsonl"))})["test"]
    cached.mkdir(parents=True)
    builder.info.dataset_name, builder.info.config_name = "wikitext", "wikitext-2-raw-v1"
    builder.info.write_to_directory(str(cached))
    with datasets.arrow_writer.ArrowWriter(path=str(cached / "wikitext-test.arrow")) as writer:
        writer.write_table(builder.data.table)
        writer.finalize()
    found = hesse.evaluate(model, standard="wikitext", samples=1).report
    direct = hesse.evaluate(model, standard="wikitext", samples=1, data=tmp_path / "rows.jsonl").report
    assert found.perplexity == direct.perplexity


def test_the_libraries_settings_return_after_an_error() -> None:
    from huggingface_hub import constants

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        with pytest.raises(RuntimeError, match="offline"), without_network():
            raise RuntimeError("offline" if constants.is_offline_mode() else "on the network")
        assert not constants.is_offline_mode()


def test_top_five_agreement_is_the_share_of_common_tokens(model: Path, tmp_path: Path) -> None:
    compress(model, tmp_path / "out", method="rtn", bits=2, group_size=32)
    found = hesse.evaluate(tmp_path / "out", reference=model, data=IDS).report
    logits = []
    for folder in (tmp_path / "out", model):
        network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            logits.append(network(torch.tensor(IDS)).logits[:, :-1].flatten(0, 1))
    ours, theirs = ([set(row.topk(5).indices.tolist()) for row in each] for each in logits)
    expected = sum(len(a & b) / 5 for a, b in zip(ours, theirs, strict=True)) / len(ours)
    assert 0.1 < expected < 0.99
    assert found.top5_agreement == pytest.approx(expected, abs=0.5 / len(ours))
    assert hesse.evaluate(model, reference=model, data=IDS).report.top5_agreement == 1
    assert common_share(torch.eye(3), torch.eye(3).flip(0), 5).tolist() == [1, 1, 1]  # a vocabulary of three


def write_task(folder: Path) -> Path:
    """A task of continuations whose documents are a file."""
    rows = [
        {"question": f"{row} ", "choices": ["the", "of a"], "answer": number % 2} for number, row in enumerate("abcd")
    ]
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = folder / "own_task.yaml"
    task.write_text(
        f"""task: own_task
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
""",
        encoding="utf-8",
    )
    return task


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed")
class TestTasks:
    def test_a_task_of_local_data_runs_on_the_model_and_the_reference(
        self, model: Path, tmp_path: Path, hesse_command: CommandLine
    ) -> None:
        task, out = write_task(tmp_path), tmp_path / "out"
        compress(model, out, method="rtn", bits=2, group_size=32)
        found = hesse.evaluate(out, reference=model, tasks=(str(task),), data=IDS).report
        (score,) = found.tasks
        assert (score.task, score.metric, score.samples) == ("own_task", "acc", 4)
        assert score.value == accuracy(out, tmp_path / "documents.jsonl")
        assert score.reference == accuracy(model, tmp_path / "documents.jsonl")
        (tmp_path / "ids.jsonl").write_text('{"input_ids": [1, 2, 3]}\n', encoding="utf-8")
        ran = hesse_command("evaluate", model, "--tasks", task, "--data", tmp_path / "ids.jsonl", "--json")
        assert ran.code == 0, ran.stderr
        assert json.loads(ran.stdout)["tasks"][0]["value"] == score.reference

    def test_what_is_not_here_is_one_line(self, model: Path, tmp_path: Path) -> None:
        for task, message in (
            ("no_such_task", "lm-evaluation-harness has no task 'no_such_task'"),
            ("none.yaml", "the task file none.yaml does not exist"),
            ("hellaswag", "the tasks hellaswag cannot be loaded from this machine, and nothing is downloaded"),
        ):
            with pytest.raises((OptionError, DataError)) as refused:
                hesse.evaluate(model, tasks=(task,), data=IDS)
            assert message in str(refused.value)
            assert "\n" not in str(refused.value)


def accuracy(folder: Path, documents: Path) -> float:
    """The share of documents whose answer has the higher log probability, from transformers' logits."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    right = 0
    rows = [json.loads(line) for line in documents.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        scores = []
        for choice in row["choices"]:
            question, space = row["question"].rstrip(), row["question"][len(row["question"].rstrip()) :]
            prompt = tokenizer(question)["input_ids"]
            whole = tokenizer(question + space + choice)["input_ids"]
            with torch.no_grad():
                logs = model(torch.tensor([whole])).logits[0].float().log_softmax(-1)
            scores.append(sum(logs[i - 1, whole[i]].item() for i in range(len(prompt), len(whole))))
        right += scores.index(max(scores)) == row["answer"]
    return right / len(rows)


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm-evaluation-harness is installed")
def test_tasks_without_the_harness_are_one_line(model: Path, hesse_command: CommandLine) -> None:
    ran = hesse_command("evaluate", model, "--tasks", "hellaswag")
    assert ran.code == 2
    assert ran.error.startswith("Error: --tasks needs lm-evaluation-harness (")
    assert ran.error.endswith("): pip install 'hesse[tasks]'")


def test_tasks_and_an_adapter_exclude_one_another(model: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="merge the adapter first"):
        hesse.evaluate(model, merge_adapter=tmp_path, tasks=("a",))
