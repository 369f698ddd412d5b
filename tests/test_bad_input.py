"""Everything that can be wrong: one line that names it, an exit code that is not 0, and nothing left on disk."""

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

import tiny_models
from helpers import OTHER_IDS, WEIGHTS, CommandLine, Ran, change, compress, left_over, output, write_ids
from hesse.checkpoints import writer
from hesse.formats import packed
from hesse.layerwise.layer_solver import LayerSolver

FolderOf = Callable[[str], Path]
Refuse = Callable[..., str]


@pytest.fixture
def model(family_folder: FolderOf, tmp_path: Path) -> Path:
    """A copy of a tiny model that a test may damage."""
    return Path(shutil.copytree(family_folder("llama"), tmp_path / "model"))


@pytest.fixture
def refused(hesse_command: CommandLine, tmp_path: Path) -> Refuse:
    """`hesse compress` that must fail: its one line on standard error, after nothing was found left of OUT."""
    data = write_ids(tmp_path / "ids.jsonl")

    def run(model: str | Path, *options: str | Path, out: str | Path = tmp_path / "out", code: int = 1) -> str:
        extra = () if "--data" in options else ("--data", data)
        ran = hesse_command("compress", model, out, *options, *extra, "--json")
        assert (ran.code, ran.stdout) == (code, "")
        assert ran.error.startswith("Error: ")
        assert left_over(tmp_path) == []
        return ran.error

    return run


# The model.


def test_a_missing_shard(model: Path, refused: Refuse, tmp_path: Path) -> None:
    tiny_models.load("llama", model).save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    second = sorted((tmp_path / "sharded").glob("model-*.safetensors"))[1]
    second.unlink()
    assert f"{second} is missing" in refused(tmp_path / "sharded")


def test_a_truncated_shard(model: Path, refused: Refuse) -> None:
    whole = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).write_bytes(whole[:-100])
    assert f"{model / WEIGHTS} is truncated or damaged" in refused(model)


def test_a_tensor_that_is_missing(model: Path, refused: Refuse) -> None:
    change(model, lambda tensors: tensors.__delitem__("model.layers.1.mlp.up_proj.weight"))
    assert "model.layers.1.mlp.up_proj.weight" in refused(model)


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        ({"model_type": "gpt-ninety", "architectures": ["GPTNinety"]}, "gpt-ninety"),
        ({"architectures": ["LlamaForEverything"]}, "LlamaForEverything"),
        ({"model_type": None}, "no model_type"),
    ],
)
def test_an_unknown_architecture(edit: dict[str, object], named: str, model: Path, refused: Refuse) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **edit}))
    assert named in refused(model)


def test_no_config(model: Path, refused: Refuse) -> None:
    (model / "config.json").unlink()
    assert f"{model}/config.json is missing" in refused(model)


def test_weights_that_are_no_numbers(model: Path, refused: Refuse) -> None:
    change(model, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"][3, 4].fill_(float("nan")))
    assert "the weight model.layers.1.mlp.up_proj.weight holds NaN or infinity" in refused(model)


@pytest.mark.parametrize("block", [0, 1])
def test_activations_that_overflow(block: int, model: Path, refused: Refuse) -> None:
    name = f"model.layers.{block}.post_attention_layernorm.weight"
    change(model, lambda tensors: tensors[name].fill_(3e38))
    assert f"the output of model.layers.{block} holds NaN or infinity" in refused(model)


def test_a_head_that_overflows(model: Path, refused: Refuse) -> None:
    change(model, lambda tensors: tensors["model.norm.weight"].fill_(3e38))
    assert "the output of LlamaForCausalLM holds NaN or infinity" in refused(model)


def test_evaluation_of_a_model_that_overflows(model: Path, hesse_command: CommandLine, tmp_path: Path) -> None:
    change(model, lambda tensors: tensors["model.layers.1.input_layernorm.weight"].fill_(3e38))
    ran = hesse_command("evaluate", model, "--data", write_ids(tmp_path / "ids.jsonl"), "--json")
    assert (ran.code, "the output of model.layers.1 holds NaN or infinity" in ran.error) == (1, True)


def test_a_compressed_model_is_no_source(model: Path, refused: Refuse, tmp_path: Path) -> None:
    compress(model, tmp_path / "packed", bits=4, group_size=32)
    assert f"{tmp_path / 'packed'} is already compressed" in refused(tmp_path / "packed")


def test_a_hub_id_without_network(refused: Refuse) -> None:
    assert "no-one/no-model is not a folder here" in refused("no-one/no-model")


def test_no_such_folder(refused: Refuse, tmp_path: Path) -> None:
    assert f"{tmp_path / 'nothing'} is not a folder" in refused(tmp_path / "nothing")


@pytest.mark.skipif(not packed.LOADER_UNPACKS, reason="an older transformers is refused any asymmetric grid")
def test_asymmetric_experts_are_refused_before_any_work(family_folder: FolderOf, refused: Refuse) -> None:
    error = refused(family_folder("mixtral"), "--asymmetric", "--group-size", "32", code=2)
    assert "block_sparse_moe.experts.0" in error
    assert "use --symmetric" in error


# The data.


def test_text_without_a_tokenizer(model: Path, refused: Refuse, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some words")
    assert f"{model} lacks tokenizer files" in refused(model, "--data", tmp_path / "text.txt")


@pytest.mark.parametrize(("text", "named"), [("", "is empty"), ("a", "is too short")])
def test_too_little_text(text: str, named: str, model: Path, refused: Refuse, tmp_path: Path) -> None:
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate("?abc")}, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(model)
    (tmp_path / "text.txt").write_text(text)
    assert f"text.txt {named}" in refused(model, "--data", tmp_path / "text.txt")


def test_no_such_data(model: Path, refused: Refuse, tmp_path: Path) -> None:
    assert "nothing.txt does not exist" in refused(model, "--data", tmp_path / "nothing.txt")


def test_a_token_outside_the_vocabulary(model: Path, refused: Refuse, tmp_path: Path) -> None:
    ids = write_ids(tmp_path / "others.jsonl", [[5, 4096]])
    assert "token id 4096" in refused(model, "--data", ids)


# The options.


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--group-size", "0"), "group size is 0"),
        (("--group-size", "-2"), "group size is -2"),
        (("--bits", "0"), "bits is 0"),
        (("--bits", "1"), "bits is 1"),
        (("--bits", "17"), "bits is 17"),
        (("--damping", "-1"), "damping is -1"),
        (("--method", "wanda", "--sparsity", "1.5"), "sparsity is 1.5"),
        (("--method", "wanda", "--sparsity", "a:b"), "sparsity is 'a:b'"),
        (("--method", "wanda", "--sparsity", "4:2"), "4:2"),
        (("--method", "wanda", "--sparsity", "nan"), "nan"),
        (("--method", "sparsegpt", "--sparsity", "3:5"), "model.layers.0.self_attn.q_proj: sparsity 3:5"),
        (("--method", "svd", "--rank", "65"), "model.layers.0.self_attn.q_proj: rank"),
        (("--method", "svd", "--rank", "0"), "rank is 0"),
        (("--method", "awqq"), "there is no method 'awqq'"),
        (("--method", "svd", "--bits", "4"), "--bits has no meaning for the method svd"),
        (("--method", "gptq", "--rank", "4"), "--rank has no meaning for the method gptq"),
        (("--method", "rtn", "--damping", "0.1"), "--damping has no meaning for the method rtn"),
        (("--method", "sparsegpt", "--group-size", "32"), "--group-size has no meaning"),
        (("--method", "sparsegpt", "--sparsity", "2:4", "--act-order"), "--act-order"),
        (("--ignore", "no_such_layer"), "the pattern 'no_such_layer' matches no layer"),
        (("--ignore", "*"), "no layer is left to compress"),
        (("--device", "abacus"), "there is no device 'abacus'"),
        (("--format", "zip"), "there is no format 'zip'"),
        (("--method", "wanda", "--format", "pack-quantized"), "model.layers.0.self_attn.q_proj: pack-quantized"),
        (("--format", "low-rank"), "--format low-rank"),
        (("--length", "1"), "--length is 1"),
        (("--samples", "0"), "--samples is 0"),
        (("--batch-size", "0"), "--batch-size is 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_options_without_a_meaning(
    options: tuple[str, ...], named: str, family_folder: FolderOf, refused: Refuse
) -> None:
    assert named in refused(family_folder("llama"), *options, code=2)


# The output.


def run_into(hesse_command: CommandLine, model: Path, out: Path, *options: str | Path) -> Ran:
    data = write_ids(out.parent / "tokens.jsonl") if out.parent.is_dir() else ""
    return hesse_command("compress", model, out, "--group-size", "32", "--data", data, "--json", *options)


@pytest.mark.parametrize("inside", ["", "deeper", "deeper/still"])
def test_out_inside_the_model(inside: str, model: Path, refused: Refuse) -> None:
    before = sorted(model.iterdir())
    for overwrite in ((), ("--overwrite",)):
        assert "lies inside the model's folder" in refused(model, *overwrite, out=model / inside)
    assert sorted(model.iterdir()) == before


def test_out_around_the_model(model: Path, refused: Refuse, tmp_path: Path) -> None:
    inner = tmp_path / "around" / "model"
    shutil.move(model, inner)
    assert "would be replaced" in refused(inner, "--overwrite", out=inner.parent)
    assert (inner / WEIGHTS).is_file()


def test_overwrite_replaces_a_model_and_nothing_else(model: Path, hesse_command: CommandLine, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run_into(hesse_command, model, out).code == 0
    (out / "mine.txt").write_text("mine")
    first = (out / WEIGHTS).read_bytes()
    ran = run_into(hesse_command, model, out)
    assert (ran.code, ran.error.startswith(f"Error: OUT {out} exists")) == (1, True)
    assert (out / WEIGHTS).read_bytes() == first
    assert run_into(hesse_command, model, out, "--bits", "3", "--overwrite").code == 0
    assert not (out / "mine.txt").exists()
    assert (out / WEIGHTS).stat().st_size < len(first)
    assert output(tiny_models.load("llama", out), OTHER_IDS).isfinite().all()
    assert left_over(tmp_path) == ["out"]


def test_overwrite_is_refused_for_what_is_no_model(model: Path, hesse_command: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    ran = run_into(hesse_command, model, tmp_path / "out", "--overwrite")
    assert (ran.code, "has no config.json" in ran.error) == (1, True)
    (tmp_path / "file").write_text("a file")
    ran = run_into(hesse_command, model, tmp_path / "file", "--overwrite")
    assert (ran.code, "is not a folder" in ran.error) == (1, True)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"
    assert (tmp_path / "file").read_text() == "a file"


def test_an_overwrite_that_fails_leaves_the_old_model(
    model: Path, hesse_command: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert run_into(hesse_command, model, out).code == 0
    before = (out / WEIGHTS).read_bytes()
    monkeypatch.setattr(writer, "save_file", full_disk)
    assert "the disk is full" in run_into(hesse_command, model, out, "--overwrite").error
    assert (out / WEIGHTS).read_bytes() == before
    assert left_over(tmp_path) == [".out.unfinished", "out"]


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_fills_up(model: Path, refused: Refuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "save_file", full_disk)
    out = tmp_path / "new" / "out"
    error = refused(model, out=out)
    assert "the disk is full" in error
    assert str(out.parent) in error
    assert error.endswith("the finished part is kept, and the same command resumes")
    assert left_over(out.parent) == [".out.unfinished"]


def test_a_disk_that_is_too_small(
    model: Path, refused: Refuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1000))
    assert f"the disk of {tmp_path / 'out'} is full" in refused(model)


# Being stopped.


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def terminate(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("stop", [interrupt, terminate])
@pytest.mark.parametrize("where", ["solve", "verify"])
def test_a_run_that_is_stopped_leaves_no_checkpoint(
    stop: Callable[..., None],
    where: str,
    model: Path,
    hesse_command: CommandLine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from hesse.jobs import compression

    if where == "solve":
        monkeypatch.setattr(LayerSolver, "solve", stop)
    else:
        monkeypatch.setattr(compression, "verify", stop)
    ran = run_into(hesse_command, model, tmp_path / "out")
    kept = "was not written; the finished part is kept, and the same command resumes."
    assert (ran.code, ran.error) == (130, f"Interrupted: {tmp_path / 'out'} {kept}")
    assert left_over(tmp_path) == [".out.unfinished"]


def test_an_error_under_a_progress_bar_is_one_line_too(
    model: Path, hesse_command: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "save_file", full_disk)
    ran = hesse_command("compress", model, tmp_path / "out", "--data", write_ids(tmp_path / "ids.jsonl"))
    assert (ran.code, ran.stdout.strip()) == (1, "")
    assert [line for line in ran.stderr.splitlines() if "Error" in line] == [ran.stderr.splitlines()[-1]]
    assert left_over(tmp_path) == [".out.unfinished"]


def test_weights_of_the_source_are_never_touched(model: Path, hesse_command: CommandLine, tmp_path: Path) -> None:
    before = load_file(model / WEIGHTS)
    assert run_into(hesse_command, model, tmp_path / "out").code == 0
    after = load_file(model / WEIGHTS)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert sorted(path.name for path in model.iterdir()) == ["config.json", "generation_config.json", WEIGHTS]
