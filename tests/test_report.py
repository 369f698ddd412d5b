"""What a report measures, against plain transformers with one layer replaced; and the page that shows it."""

import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import Tensor

import hesse
import tiny_models
from helpers import IDS, CommandLine, change, compress, dense_tensors, sha256, write_ids
from hesse.checkpoints.locate import DEFAULT_FOLDER
from hesse.data import read_samples
from hesse.errors import OptionError
from hesse.evaluation import continuations
from hesse.evaluation.measurements import BAND, LAYER_BAND, MeasuredMean, Measurements, outside_band
from hesse.jobs.report import CompressionReport
from hesse.methods import Recipe
from hesse.reporting import compression_page
from hesse.reporting.compression import repeat_command
from hesse.reporting.terminal import number

FolderOf = Callable[[str], Path]
TEXT = "".join(f"def f{n}(a, b):\n    return a * {n} + b\n\n\n" for n in range(400))


def measured(report: CompressionReport) -> Measurements:
    assert report.measurements is not None
    return report.measurements


@pytest.fixture(scope="module")
def of_family(family_folder: FolderOf, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], CompressionReport]:
    """A function from a family's name to the report of its tiny model, with ready ids, measured."""
    made: dict[str, CompressionReport] = {}

    def report(name: str) -> CompressionReport:
        if name not in made:
            out = tmp_path_factory.mktemp(f"{name}-compressed") / "out"
            made[name] = compress(family_folder(name), out, bits=3, group_size=32, measure=True)
        return made[name]

    return report


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer, and a text beside it."""
    folder = tiny_models.save("llama", tmp_path_factory.mktemp("writer"), vocab_size=4096)
    for path in DEFAULT_FOLDER.glob("tokenizer*"):
        shutil.copy(path, folder)
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def with_text(writer: Path, tmp_path_factory: pytest.TempPathFactory) -> CompressionReport:
    """The tiny model compressed on a text, of which a part is held out."""
    out, options = tmp_path_factory.mktemp("written") / "out", hesse.Options(bits=3, group_size=32)
    return hesse.compress(
        writer, out, options=options, data=writer / "text.txt", samples=4, length=64, measure=True
    ).report


def cost(name: str, source: Path, moved: dict[str, Tensor]) -> tuple[float, float]:
    """KL, or half the squared error, per token of the dense model with tensors `moved`, by transformers alone."""
    dense, other = (tiny_models.load(name, source, dtype=torch.float32) for _ in range(2))
    sources = {key.split("model.", 1)[-1]: key for key in moved}
    with torch.no_grad():
        for parameter, value in other.named_parameters():
            key = sources.get(parameter.split("model.", 1)[-1]) or sources.get(parameter.split("transformer.", 1)[-1])
            if key is not None:
                value.copy_(moved[key])
        wanted, result = (model(input_ids=torch.tensor(IDS)) for model in (dense, other))
    if "logits" not in wanted:
        errors = 0.5 * (wanted.last_hidden_state - result.last_hidden_state).double().square().sum(-1)
    else:
        logs, changed = (out.logits[:, :-1].double().log_softmax(-1) for out in (wanted, result))
        errors = (logs.exp() * (logs - changed)).sum(-1)
    return float(errors.mean()), float(errors.std(correction=0) / errors.numel() ** 0.5)


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "bert"])
def test_each_layer_alone(name: str, of_family: Callable[[str], CompressionReport], family_folder: FolderOf) -> None:
    report, source = of_family(name), family_folder(name)
    found, after = measured(report), dense_tensors(Path(report.out))
    assert [group.name for group in found.layers] == [layer.name for layer in report.layers]
    for group, layer in zip(found.layers, report.layers, strict=True):
        key = f"{layer.name}.weight"
        value, error = cost(name, source, {key: after[key]})
        assert value > 0
        assert group.measured.value == pytest.approx(value, rel=1e-3)
        assert group.measured.standard_error == pytest.approx(error, rel=1e-2)
        assert group.predicted == layer.predicted_loss_increase


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "bert"])
def test_the_line_between_both(
    name: str, of_family: Callable[[str], CompressionReport], family_folder: FolderOf
) -> None:
    report, source = of_family(name), family_folder(name)
    before, after = dense_tensors(source), dense_tensors(Path(report.out))
    points = measured(report).line
    assert [point.share for point in points] == sorted(point.share for point in points)
    keys = [f"{layer.name}.weight" for layer in report.layers]
    for point in points:
        moved = {key: before[key] + point.share * (after[key].float() - before[key]) for key in keys}
        value, error = cost(name, source, moved)
        assert point.measured.value == pytest.approx(value, rel=1e-3)
        assert point.measured.standard_error == pytest.approx(error, rel=1e-2)
        assert point.predicted == pytest.approx(point.share**2 * report.loss.predicted)


def test_the_whole_change_is_what_verification_measured(of_family: Callable[[str], CompressionReport]) -> None:
    for name in ("llama-tied", "gpt2", "bert", "mixtral"):
        report = of_family(name)
        assert measured(report).whole.measured.value == pytest.approx(report.loss.measured, rel=1e-9)
        assert measured(report).check.divergence == measured(report).whole.measured


def test_experts_are_changed_together(of_family: Callable[[str], CompressionReport], family_folder: FolderOf) -> None:
    report, after = of_family("mixtral"), dense_tensors(Path(of_family("mixtral").out))
    groups = {group.name: group for group in measured(report).layers}
    assert sum(len(group.layers) for group in groups.values()) == len(report.layers)
    name = next(name for name in groups if name.endswith("experts.*.w1"))
    assert groups[name].layers == [name.replace("*", str(expert)) for expert in range(4)]
    members = [layer for layer in report.layers if layer.name in groups[name].layers]
    assert groups[name].predicted == pytest.approx(sum(layer.predicted_loss_increase or 0.0 for layer in members))
    # transformers fuses experts, so the model with one matrix of each replaced is written and evaluated.
    source = family_folder("mixtral")
    copy = Path(shutil.copytree(source, Path(report.out).with_name("one-matrix")))

    change(
        copy, lambda tensors: tensors.update({f"{key}.weight": after[f"{key}.weight"] for key in groups[name].layers})
    )
    result = hesse.evaluate(copy, reference=source, data=IDS).report
    assert groups[name].measured.value == pytest.approx(result.kl, rel=1e-3)


def test_text_seen_and_held_out(with_text: CompressionReport, writer: Path) -> None:
    found, out = measured(with_text), Path(with_text.out)
    assert found.seen is not None
    assert (found.check.samples, found.seen.samples) == (16, 4)  # no more than were calibrated on
    samples = read_samples(
        writer / "text.txt", out, count=4, length=64, seed=0, purpose="calibration", limit=None, reserve=16
    )
    for text, chosen in zip((found.seen, found.check), samples, strict=True):
        result = hesse.evaluate(out, reference=writer, data=[ids.tolist() for ids in chosen.ids]).report
        assert text.dense_loss == pytest.approx(result.reference_loss, rel=1e-4)
        assert text.compressed_loss == pytest.approx(result.model_loss, rel=1e-4)
        assert text.divergence.value == pytest.approx(result.kl, rel=1e-3)
        assert text.divergence.standard_error == pytest.approx(result.kl_standard_error, rel=1e-3)
        assert text.top1_agreement == pytest.approx(result.top1_agreement, abs=2e-3)


def test_nothing_is_measured_unless_asked_for(family_folder: FolderOf, tmp_path: Path) -> None:
    report = compress(family_folder("llama"), tmp_path / "out", bits=4, group_size=32)
    assert report.measurements is None
    assert "measure" not in report.seconds
    with pytest.raises(OptionError, match="measure=True"):
        compression_page(report)


@pytest.mark.parametrize(("method", "options"), [("rtn", {"bits": 4, "group_size": 32}), ("svd", {"rank": 8})])
def test_without_calibration_nothing_was_seen(
    method: str, options: dict[str, int], tmp_path: Path, writer: Path
) -> None:
    data, chosen = writer / "text.txt", hesse.Options(**options)
    report = hesse.compress(
        writer, tmp_path / "out", method=method, options=chosen, data=data, samples=4, length=64, measure=True
    ).report
    assert measured(report).seen is None
    assert "Nothing could be fitted too closely." in compression_page(report)
    assert all(layer.rank == options.get("rank") for layer in report.layers)


def test_zeros_are_counted(family_folder: FolderOf, tmp_path: Path) -> None:
    report = compress(family_folder("llama"), tmp_path / "out", method="sparsegpt", sparsity="2:4")
    after = dense_tensors(tmp_path / "out")
    for layer in report.layers:
        assert layer.sparsity == pytest.approx(float((after[f"{layer.name}.weight"] == 0).float().mean()))
        assert layer.sparsity == pytest.approx(0.5, abs=1e-3)
        assert layer.rank is None


def test_continuations_are_what_transformers_writes(with_text: CompressionReport) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(with_text.out)
    model = AutoModelForCausalLM.from_pretrained(with_text.out)
    found = measured(with_text).continuations
    assert len(found) == continuations.PROMPTS
    for text in found[:2]:
        ids = tokenizer(text.prompt, add_special_tokens=False, return_tensors="pt").input_ids
        written = model.generate(ids, max_new_tokens=continuations.GENERATED_TOKENS, do_sample=False, pad_token_id=0)
        assert tokenizer.decode(written[0], clean_up_tokenization_spaces=False) == (
            text.prompt + text.shared + text.compressed
        )
        assert (text.shared_tokens == text.tokens) == (text.dense == text.compressed == "")


def test_no_continuations_without_memory(
    family_folder: FolderOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(continuations, "_free_memory", lambda _: 1000)
    report = compress(family_folder("llama"), tmp_path / "out", bits=4, group_size=32, measure=True)
    assert measured(report).continuations == []
    assert "1,000 bytes are free" in measured(report).notes[0]
    assert "1,000 bytes are free" in compression_page(report)


def test_the_band() -> None:
    assert not outside_band(BAND, MeasuredMean(1.0, 0.01), 1.0)
    assert outside_band(BAND, MeasuredMean(2.1, 0.01), 1.0)
    assert not outside_band(BAND, MeasuredMean(2.1, 0.1), 1.0)  # as far as can be seen
    assert outside_band(BAND, MeasuredMean(0.4, 0.01), 1.0)
    assert outside_band(BAND, MeasuredMean(float("nan"), 0.0), 1.0)
    assert not outside_band(BAND, MeasuredMean(1.0, 0.0), None)


# The page


class Reader(HTMLParser):
    """Checks that a page is well formed and asks for nothing from elsewhere, and keeps its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(page)
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag != "meta":
            self.open.append(tag)
        assert tag not in ("script", "link", "img", "iframe", "object", "embed", "video", "audio")
        for name, value in attrs:
            assert name not in ("src", "srcset", "onload", "onclick", "onerror")
            assert not (name.endswith("href") and value and value[0] != "#")
            assert not (name == "style" and value and "url(" in value.replace("url(#", ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "bert", "mixtral"])
def test_the_page_says_what_the_report_says(name: str, of_family: Callable[[str], CompressionReport]) -> None:
    report = of_family(name)
    found, page = measured(report), compression_page(report)
    assert page.count("<!doctype html>") == 1
    assert page.count("<svg") == 4
    assert "@import" not in page
    text = Reader(page).text
    for group in found.layers:
        assert number(group.predicted, 3) in text
        assert f"{number(group.measured.value, 3)} ± {number(group.measured.standard_error, 1)}" in text
    for point in found.line:
        assert f"{number(point.predicted, 3)} {number(point.measured.value, 3)} ±" in text
    assert f"{report.bytes_before:,} bits" in text.replace(f" {report.bytes_after:,}", "")
    assert number(report.bits_per_weight) in text
    assert ("Continuations of both models" in text) == (name != "bert")
    assert ("perplexity" in text) == (name != "bert")
    assert ("Tokens per expert" in text) == (name == "mixtral")
    assert "Nothing was held out." in text
    assert "No alternatives were planned" in text
    for layer in report.layers:
        assert f"{layer.tokens:,}" in text
    assert all(note in text for note in report.notes)
    assert json.dumps(report.to_dict()["measurements"])


def test_a_page_with_text(with_text: CompressionReport) -> None:
    found, text = measured(with_text), Reader(compression_page(with_text)).text
    assert found.seen is not None
    assert f"{number(found.seen.divergence.value, 3)} ±" in text
    assert "2 samples" not in text
    assert " ".join(found.continuations[0].prompt.split()) in text


def test_warnings(of_family: Callable[[str], CompressionReport]) -> None:
    report = of_family("llama-tied")
    found = measured(report)
    # Costs that are ten times as large, but for the smallest shares, and much smaller on text that was calibrated on.
    line = [
        replace(point, measured=MeasuredMean(10 * point.predicted, 0.0)) if point.share > 0.5 else point
        for point in found.line
    ]
    layers = [
        replace(found.layers[0], measured=MeasuredMean(10 * (found.layers[0].predicted or 0.0), 0.0)),
        *found.layers[1:],
    ]
    seen = replace(found.check, divergence=MeasuredMean(found.check.divergence.value / 2, 1e-6))
    worse = replace(report, measurements=replace(found, line=line, layers=layers, seen=seen), notes=["a fallback"])
    assert measured(worse).holds_up_to == 0.5
    text = Reader(compression_page(worse)).text
    assert "The cost is not as predicted." in text
    assert "measured / predicted is 10, outside of the band 0.5 to 2" in text
    assert f"{found.layers[0].name} (10)" in text
    assert f"outside of the band {number(LAYER_BAND[0], 2)} to 3" in text
    assert "outside of where the quadratic model holds. It breaks down beyond 0.5 of the change" in text
    assert "Calibration is overfitted" in text
    assert "There was one departure" in text
    assert "a fallback" in text


def test_cheap_layers_outside_of_the_band_are_no_warning(of_family: Callable[[str], CompressionReport]) -> None:
    report = of_family("llama-tied")
    found = measured(report)
    cheap = replace(found.layers[0], predicted=1e-9, measured=MeasuredMean(1e-8, 0.0))
    layers = [cheap, *(replace(group, predicted=group.measured.value) for group in found.layers[1:])]
    text = Reader(compression_page(replace(report, measurements=replace(found, layers=layers)))).text
    assert "All layers that matter cost what was predicted. 1 of 14 layers, changed alone, are outside" in text


def test_a_page_without_predictions(of_family: Callable[[str], CompressionReport]) -> None:
    report = of_family("llama-tied")
    found = measured(report)
    line = [replace(point, predicted=0.0) for point in found.line]
    layers = [replace(group, predicted=None) for group in found.layers]
    loss = replace(report.loss, predicted=0.0)
    unknown = replace(report, loss=loss, measurements=replace(found, line=line, layers=layers))
    text = Reader(compression_page(unknown)).text
    assert "Nothing was predicted." in text
    assert "The quadratic model" not in text


def test_whatever_came_from_outside_is_escaped(of_family: Callable[[str], CompressionReport]) -> None:
    evil = "<script>alert(1)</script>$x_{$&\"'"
    report = of_family("llama-tied")
    found = measured(report)
    groups = [replace(group, name=evil + group.name) for group in found.layers]
    text = found.continuations[0]
    written = [replace(text, prompt=evil, shared=evil, dense=evil, compressed=evil)]
    hostile = replace(
        report,
        model=evil,
        out=evil,
        notes=[evil],
        calibration={**report.calibration, "source": evil},
        recipe={**report.recipe, "ignore": [evil]},
        front=[{"bytes": 10, "predicted": 0.1, "kind": "uniform", "label": evil}],
        measurements=replace(found, layers=groups, continuations=written, notes=[evil]),
    )
    page = compression_page(hostile, f"hesse {evil}")
    assert "<script" not in page
    assert Reader(page).text.count("alert(1)") > 10


def test_the_front(of_family: Callable[[str], CompressionReport]) -> None:
    report = of_family("llama-tied")
    front = [
        {"bytes": 200_000, "predicted": 0.5, "kind": "uniform", "label": "2 bits"},
        {"bytes": report.bytes_after, "predicted": 0.1, "kind": "chosen", "label": ""},
        {"bytes": 400_000, "predicted": 0.01, "kind": "front", "label": ""},
    ]
    text = Reader(compression_page(replace(report, front=front))).text
    assert "all layers: 2 bits" in text
    assert "2 bits 200,000 0.5" in text
    assert "No alternatives were planned" not in text


def test_the_line_that_repeats_it(
    of_family: Callable[[str], CompressionReport],
    with_text: CompressionReport,
    writer: Path,
    hesse_command: CommandLine,
    tmp_path: Path,
) -> None:
    assert "--data IDS.jsonl --samples 8 --length 32 --seed 0" in repeat_command(of_family("gpt2"))
    line = repeat_command(with_text)
    assert f"--data {writer / 'text.txt'} --samples 4 --length 64" in line
    (tmp_path / "recipe.yaml").write_text(Recipe.model_validate(with_text.recipe).to_yaml(), encoding="utf-8")
    words = shlex.split(line.replace("recipe.yaml", str(tmp_path / "recipe.yaml")))
    words[words.index(with_text.out)] = str(tmp_path / "out")
    assert words[0] == "hesse"
    assert hesse_command(*words[1:]).code == 0
    assert sha256(tmp_path / "out") == sha256(Path(with_text.out))


def test_on_the_command_line(
    family_folder: FolderOf, hesse_command: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, data, page = family_folder("llama"), write_ids(tmp_path / "ids.jsonl"), tmp_path / "a page.html"
    options = ("--bits", "4", "--group-size", "32", "--data", data, "--report", page)
    ran = hesse_command("compress", source, tmp_path / "out", *options)
    assert ran.code == 0
    assert f"The report: {page}" in ran.stdout.replace("\n", "")
    assert f"--report '{page}'" in Reader(page.read_text(encoding="utf-8")).text
    stored = json.loads((tmp_path / "out" / "hesse-report.json").read_text(encoding="utf-8"))
    assert len(stored["measurements"]["layers"]) == 14
    refused = hesse_command("compress", source, tmp_path / "other", *options)
    assert (refused.code, "exists: give another name, or --overwrite" in refused.error) == (1, True)
    assert not (tmp_path / "other").exists()
    ran = hesse_command("compress", source, tmp_path / "out", *options, "--overwrite", "--json")
    assert (ran.code, "measurements" in json.loads(ran.stdout)) == (0, True)
    inside = ("--bits", "4", "--group-size", "32", "--data", data, "--report", tmp_path / "other" / "report.html")
    assert hesse_command("compress", source, tmp_path / "other", *inside).code == 0
    assert (tmp_path / "other" / "report.html").is_file()
    shutil.rmtree(tmp_path / "other")
    for out in (tmp_path / "page", tmp_path / "page" / "out"):  # the page's name is that of a folder to come
        same = hesse_command("compress", source, out, *options[:-1], tmp_path / "page")
        assert (same.code, "give --report another name" in same.error) == (1, True)
        assert not (tmp_path / "page").exists()
    monkeypatch.setattr("hesse.reporting.page.find_spec", lambda _: None)
    lacking = hesse_command("compress", source, tmp_path / "other", *options, "--overwrite")
    assert (lacking.code, "leave out --report" in lacking.error) == (2, True)
    assert not (tmp_path / "other").exists()
