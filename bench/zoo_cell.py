"""One cell of the zoo: build a tiny model, compress it, load the result with plain transformers, and compare.

Each step runs in a process of its own with a time limit, forked from one that has transformers and not Hesse.
"""

import hashlib
import inspect
import json
import multiprocessing
import re
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import zoo_models
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

WORKS, REFUSED, LOADS_NOT = "works", "refused in one line", "missing or random weights on load"
DENSE_SILENT, DENSE_TOLD = "left dense silently", "left dense, told"
TRACEBACK, WRONG, UNBUILT = "traceback", "wrong", "cannot be built here"
VERDICTS = (WORKS, REFUSED, LOADS_NOT, DENSE_SILENT, DENSE_TOLD, TRACEBACK, WRONG, UNBUILT)
TOLERANCE = 1e-3  # of outputs, in standard deviations; of losses, in nats
ROUNDING = 0.02  # relative error of a weight at 8 bits: more than the largest that groups of 16 give
MOST_NAMES = 5  # kept of each list
MOST_DENSE = 0.05  # share of the language model's linear weights
TOWER = re.compile(
    r"(^|[._])(vision|visual|image|img|audio|speech|patch|tower|vit|sam|qformer|connector|projector|aligner|"
    r"multi_modal_projector|mm_|vqmodel|resampler|perceiver|conformer|embed_vision|embed_audio|pixel|video)"
)
HEADS = re.compile(r"(lm_head|embed_out|output_projection|cls\.predictions|proj_out|decoder_projection)")
LISTS_OF_WORK = ("layers", "recipe", "front", "calibration", "versions", "seconds", "measurements")

Step = Callable[[str, str, Path], dict[str, Any]]


def run_cell(group: str, model_type: str, folder: Path, seconds: float) -> dict[str, Any]:
    """Run the three steps; return the verdict, its detail and what was measured."""
    found: dict[str, Any] = {"class": str(zoo_models.groups()[group][model_type])}
    for step, failure in ((build, UNBUILT), (compress, TRACEBACK), (load, LOADS_NOT)):
        answer = _in_process(step, group, model_type, folder, seconds)
        if "error" in answer:
            detail = answer["error"].replace(f"{folder}/", "")
            return {**found, "verdict": answer.get("verdict", failure), "detail": detail}
        found |= answer
    verdict, detail = judge(found)
    found["left_dense"] = found["left_dense"][:MOST_NAMES]
    found["keys"] = {kind: names[:MOST_NAMES] for kind, names in found["keys"].items()}
    return {**found, "verdict": verdict, "detail": detail}


def judge(found: dict[str, Any]) -> tuple[str, str]:
    """The verdict on a cell whose three steps ended, and the figure or the names that it rests on."""
    if any(found["keys"].values()):
        kinds = (f"{len(names)} {kind} keys: {names[0]}" for kind, names in found["keys"].items() if names)
        return LOADS_NOT, "; ".join(kinds)
    if found["decoding_error"] > ROUNDING:
        return WRONG, f"{found['worst_weight']} decodes to {found['decoding_error']:.3g} of its norm beside itself"
    if not found["difference"] < TOLERANCE:
        return WRONG, f"outputs differ by {found['difference']:.3g} standard deviations"
    for whose in ("dense", "compressed"):
        plain, ours = found[f"{whose}_loss"], found.get(f"hesse_{whose}_loss")
        if None not in (plain, ours) and not abs(plain - ours) < TOLERANCE:
            return WRONG, f"loss of the {whose} model: {ours:.5f} by Hesse, {plain:.5f} by transformers"
    if "evaluate_error" in found:
        return WRONG, f"hesse.evaluate: {found['evaluate_error']}"
    unlisted = [name for name, listed in found["left_dense"] if not listed]
    share = f"{100 * found['dense_share']:.3g} %"
    if unlisted:
        return DENSE_SILENT, f"{share} dense, {len(unlisted)} not listed: {_kinds(unlisted)}"
    if found["dense_share"] > MOST_DENSE:
        return DENSE_TOLD, f"{share} dense: {_kinds([name for name, _ in found['left_dense']])}"
    return WORKS, f"{share} dense"


def _kinds(names: list[str]) -> str:
    return ", ".join(list(dict.fromkeys(_pattern(name) for name in names))[:4])


def _in_process(step: Step, group: str, model_type: str, folder: Path, seconds: float) -> dict[str, Any]:
    """What a step returned in a process of its own, or its error."""
    context = multiprocessing.get_context("fork")
    answer = folder / f"{step.__name__}.json"
    process = context.Process(target=_answer, args=(step, group, model_type, folder, answer))
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
        return {"error": f"{step.__name__} took more than {seconds:g} s"}
    if not answer.exists():
        return {"error": f"{step.__name__} ended with exit code {process.exitcode}"}
    found: dict[str, Any] = json.loads(answer.read_text())
    return found


def _answer(step: Step, group: str, model_type: str, folder: Path, answer: Path) -> None:
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    torch.set_num_threads(1)
    with (folder / "log.txt").open("a") as log:
        sys.stdout = sys.stderr = log
        try:
            found = step(group, model_type, folder)
        except Exception as error:
            found = {"error": last_line(error)}
        answer.write_text(json.dumps(found))


def last_line(error: BaseException) -> str:
    """The class and message of an error on one line, and where it was raised: in Hesse if it passed there."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/hesse/" in frame.filename]
    places = dict.fromkeys(f"{Path(frame.filename).name}:{frame.lineno}" for frame in (*ours[-1:], frames[-1]))
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message[:300]} ({', '.join(places)})"


def build(group: str, model_type: str, folder: Path) -> dict[str, Any]:
    """Build and save the model, and keep what plain transformers computes with it after loading."""
    cls = zoo_models.model_class(zoo_models.groups()[group][model_type])
    if "input_ids" not in inspect.signature(cls.forward).parameters and group == "base":
        raise TypeError("takes no token ids")
    model, arguments = _first_that_runs(cls, model_type)
    linear = {
        _sha(part): f"{name}.{kind}" if name else kind
        for name, module in model.named_modules()
        for kind, parameter in module.named_parameters(recurse=False)
        if zoo_models.is_linear(module, parameter) and not HEADS.search(name)
        for part in (parameter, parameter.mT, *_slices(parameter))
    }
    head = model.get_output_embeddings()
    if head is not None and getattr(head, "weight", None) is not None:
        linear.pop(_sha(head.weight), None)
    model.save_pretrained(folder / "model")
    torch.save(arguments, folder / "arguments.pt")
    loaded, keys = _load(cls, folder / "model")
    expected, reloaded = zoo_models.output(model, arguments), zoo_models.output(loaded, arguments)
    if any(keys.values()) or not _difference(reloaded, expected) < TOLERANCE:
        raise ValueError(f"plain transformers does not load what it saved: {keys}")
    torch.save(expected, folder / "expected.pt")
    (folder / "linear.json").write_text(json.dumps(linear))
    return {"parameters": sum(p.numel() for p in model.parameters()), "dense_loss": _loss(loaded, arguments)}


def _first_that_runs(cls: type[PreTrainedModel], model_type: str) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """A model and arguments that it takes; raise the first error if there are none."""
    first: Exception | None = None
    for keep_layer_lists in (True, False):
        try:
            model = zoo_models.build(cls, zoo_models.shrink(model_type, keep_layer_lists))
        except Exception as error:
            first = first or error
            continue
        for arguments in zoo_models.inputs(model):
            try:
                if zoo_models.output(model, arguments).isfinite().all():
                    return model, arguments
                raise ValueError("outputs are not finite")
            except Exception as error:
                first = first or error
    assert first is not None
    raise first


def compress(group: str, model_type: str, folder: Path) -> dict[str, Any]:
    """Compress the model, evaluate it, and write what Hesse reads of the result as a dense model."""
    from safetensors.torch import save_file

    import hesse
    from hesse.errors import HesseError
    from hesse.formats import open_checkpoint
    from hesse.networks.network import CheckpointNetwork

    model, out, ids = folder / "model", folder / "out", zoo_models.random_ids()
    options = hesse.Options(bits=8, group_size=16)
    try:
        hesse.compress(model, out, method="rtn", options=options, data=ids, device="cpu")
    except HesseError as error:
        return {"error": " ".join(str(error).split()), "verdict": REFUSED if "\n" not in str(error) else TRACEBACK}
    found = _read_back(folder)
    checkpoint = open_checkpoint(out)
    result = CheckpointNetwork(checkpoint, torch.float32, torch.device("cpu")).tensors
    tensors = {name: tensor.contiguous() for name, tensor in checkpoint.read(checkpoint.names()).items()}
    source = CheckpointNetwork(open_checkpoint(model), torch.float32, torch.device("cpu")).tensors
    tensors = _as_in_model(source, result, tensors)
    shutil.copytree(model, folder / "dense", ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    save_file(tensors, folder / "dense" / "model.safetensors", metadata={"format": "pt"})
    before = source.checkpoint.read(source.checkpoint.names())
    errors = {name: float((tensors[name] - w).norm() / w.norm()) for name, w in before.items() if _comparable(name, w)}
    found["worst_weight"] = max(errors, key=errors.__getitem__)
    found["decoding_error"] = errors[found["worst_weight"]]
    try:
        report = hesse.evaluate(out, reference=model, data=ids, device="cpu").report
        found |= {
            "kl": report.kl,
            "hesse_dense_loss": report.reference_loss,
            "hesse_compressed_loss": report.model_loss,
        }
    except Exception as error:
        found["evaluate_error"] = last_line(error)
    return found


def _as_in_model(source: Any, result: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that Hesse reads of the result under the names of the model's, where it stores others."""
    found = {name: tensors[name] for name in source.checkpoint.names() if name in tensors}
    for name in source.checkpoint.names():
        if name not in found:
            found |= source.join_changed(name, result.read(source.by_key[name]))
    return found


def _comparable(name: str, weight: Tensor) -> bool:
    return weight.is_floating_point() and weight.numel() > 0 and bool(weight.norm() > 0)


def _read_back(folder: Path) -> dict[str, Any]:
    """The share of linear weights that OUT stores dense, and the names of those, with whether the report lists each."""
    from safetensors.torch import load_file

    linear: dict[str, str] = json.loads((folder / "linear.json").read_text())
    stored = {name: t for path in (folder / "out").glob("*.safetensors") for name, t in load_file(path).items()}
    text = _listed_text(json.loads((folder / "out" / "hesse-report.json").read_text()))
    packed = sum(
        int(t.prod())
        for name, t in stored.items()
        if name.endswith(".weight_shape") and not TOWER.search(name) and not HEADS.search(name)
    )
    dense, towers, count = [], 0, 0
    for name, tensor in stored.items():
        module = linear.get(_sha(tensor)) if tensor.ndim in (2, 3) else None
        if module is None or HEADS.search(name):
            continue
        if TOWER.search(module) or TOWER.search(name):
            towers += tensor.numel()
            continue
        count += tensor.numel()
        dense.append((name, any(_pattern(other) in text for other in (name, module))))
    share = count / (count + packed) if count + packed else 1.0
    return {"dense_share": share, "left_dense": dense, "tower_weights_dense": towers}


def _listed_text(report: dict[str, Any]) -> str:
    """The report without its records of what was done, numbers of layers and experts replaced by stars."""
    rest = {name: value for name, value in report.items() if name not in LISTS_OF_WORK}
    return _pattern(json.dumps(rest))


def _pattern(name: str) -> str:
    """A name with a star for each number, or for a set of numbers: model.layers.*.mlp.gate."""
    return re.sub(r"(?<=\.)(\d+|\[[\d, -]+\]|\{[\d,.\- ]+\}|\d+-\d+|N)(?=\.)", "*", name.removesuffix(".weight"))


def load(group: str, model_type: str, folder: Path) -> dict[str, Any]:
    """Load OUT, and what Hesse reads of it, with plain transformers, and compare their outputs."""
    cls = zoo_models.model_class(zoo_models.groups()[group][model_type])
    arguments = torch.load(folder / "arguments.pt")
    compressed, keys = _load(cls, folder / "out")
    ours, _ = _load(cls, folder / "dense")
    found = zoo_models.output(compressed, arguments)
    expected = torch.load(folder / "expected.pt")
    return {
        "keys": keys,
        "difference": _difference(found, zoo_models.output(ours, arguments)),
        "difference_from_dense": _difference(found, expected),
        "compressed_loss": _loss(compressed, arguments),
    }


def _load(cls: type[PreTrainedModel], folder: Path) -> tuple[PreTrainedModel, dict[str, list[str]]]:
    """A model in float32, and the keys that loading it could not place."""
    model, info = cls.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    names = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    keys = {name.removesuffix("_keys"): sorted(map(str, info.get(name) or ())) for name in names}
    return model.eval(), keys


def _loss(model: PreTrainedModel, arguments: dict[str, Tensor]) -> float | None:
    """The mean loss of next tokens over all samples; None for a model that takes more than ids, or has no head.

    An encoder-decoder predicts the ids that its encoder reads.
    """
    if model.config.is_encoder_decoder and "input_ids" in arguments and model.get_output_embeddings() is not None:
        ids = torch.tensor(zoo_models.random_ids())
        try:
            with torch.no_grad():
                logits = model(input_ids=ids, labels=ids).logits
        except (AttributeError, TypeError, ValueError):  # it takes no labels, or has no first token
            return None
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()))
    if set(arguments) != {"input_ids"} or model.get_output_embeddings() is None:
        return None
    ids = torch.tensor(zoo_models.random_ids())
    logits = zoo_models.output(model, {"input_ids": ids})
    if logits.shape[:2] != ids.shape:
        return None
    return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


def _difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference in standard deviations of what was expected; infinite if the shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    return float((found - expected).abs().max() / expected.std())


def _slices(parameter: Tensor) -> list[Tensor]:
    """The matrices of experts, and their halves, as they may be stored."""
    if parameter.ndim != 3:
        return []
    whole = [part for matrix in parameter for part in (matrix, matrix.T)]
    return [part for matrix in whole for part in (matrix, *matrix.chunk(2), *matrix.chunk(2, dim=1))]


def _sha(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().float().contiguous().numpy().tobytes()).hexdigest()[:24]
