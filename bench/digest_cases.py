"""The cases of `digests.py`: every command and every method of the table, on models of a second or less.

A case is given an empty folder, and returns values and the paths that it wrote. Names of cases stay as they are, so
that results of different versions can be compared.
"""

import importlib.util
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import digest_api as api
import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
import tiny_models

CASES: dict[str, Callable[[Path], object]] = {}
IDS = tiny_models.random_ids(4, 24)
OTHER_IDS = tiny_models.random_ids(4, 20, seed=7)
FEW: dict[str, Any] = {"samples": 8, "length": 64}  # of the shipped text

SCRATCH = TemporaryDirectory(prefix="digests-")  # removed when the program ends
FAMILIES = ("llama", "qwen2-moe", "gpt2")
# What fits the narrow layers of a small network, by what a method's layers become.
NARROW: dict[str, dict[str, Any]] = {
    "grid": {"bits": 3, "group_size": 16},
    "low_rank": {"rank": 2},
    "codebook": {"bits": 2},
    "table": {"group_size": 16},
    "vector_codebook": {"vector_length": 2},
}
GROUPS = ("random", "magnitude", "taylor", "fisher", "hap", "heapr", "obs")
SCORES = ("random", "magnitude", "gradient", "oba", "obd", "m-fac-network", "mad")
WAYS = ("zeros", "teacher", "codes", "movement", "one-bit", "signs", "compression-aware")


# Models and data


@cache
def family(name: str, dtype: torch.dtype = torch.float32) -> Path:
    """The folder of a tiny model."""
    return tiny_models.save(name, Path(SCRATCH.name) / f"{name}-{dtype}", dtype)


def language_model(name: str) -> nn.Module:
    """A tiny model in memory."""
    return tiny_models.load(name, family(name))


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """What a language model gives for token ids."""
    result: Tensor = model(input_ids=ids).logits
    return result


def tokens() -> list[tuple[Any, Tensor]]:
    """Batches of token ids, and the next one of each."""
    ids = torch.tensor(tiny_models.random_ids(12, 10))
    following = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], 1)
    return list(zip(ids.split(4), following.split(4), strict=True))


def images(samples: int = 96) -> list[tuple[Any, Tensor]]:
    """Random images (1, 8, 8), of ten classes that a random matrix tells apart."""
    generator = torch.Generator().manual_seed(1)
    values, matrix = torch.randn(samples, 64, generator=generator), torch.randn(64, 10, generator=generator)
    return list(zip(values.view(-1, 1, 8, 8).split(32), (values @ matrix).argmax(1).split(32), strict=True))


def small_net() -> nn.Module:
    """A convolution, a norm and two layers."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, stride=2),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(96, 16),
        nn.GELU(),
        nn.Linear(16, 10),
    ).eval()


class Attending(nn.Module):
    """Torch's own attention over the rows of an image, and a read-out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.inner, self.head = nn.Linear(8, 12), nn.Linear(12, 10)

    def forward(self, values: Tensor) -> Tensor:
        rows = values.squeeze(1)
        hidden = rows + self.attention(rows, rows, rows, need_weights=False)[0]
        result: Tensor = self.head(self.inner(hidden).relu().mean(1))
        return result


# Commands


def compressing(model: Callable[[], str | Path], folder: Path, **arguments: Any) -> object:
    """Compress, on a few token ids unless the arguments name other data."""
    data = {} if "samples" in arguments or "curvature" in arguments else {"data": IDS}
    return api.compress(model(), folder / "out", **data, **arguments), folder / "out"


def default() -> str:
    """The shipped model."""
    return "default"


def statistics_of(model: str | Path, folder: Path, kinds: tuple[str, ...]) -> object:
    """Estimate from the shipped text, or for a tiny model from token ids in a file."""
    if model == "default":
        return api.estimate(model, folder, curvatures=kinds, **FEW)
    ids = folder.parent / "ids.jsonl"
    ids.write_text("".join(f'{{"input_ids": {sample}}}\n' for sample in IDS))
    return api.estimate(model, folder, curvatures=kinds, data=ids)


def estimated(name: Callable[[], str | Path], folder: Path, kinds: tuple[str, ...]) -> object:
    """The folder and the index of an estimation."""
    return statistics_of(name(), folder / "out", kinds), folder / "out"


def compressing_from_statistics(folder: Path, method: str) -> object:
    """Compress from a folder of statistics."""
    statistics_of(family("llama"), folder / "statistics", ("gram", "kronecker", "fisher"))
    return compressing(partial(family, "llama"), folder, method=method, curvature=folder / "statistics")


def inspecting_from_statistics(folder: Path) -> object:
    """Inspect from a folder of statistics."""
    statistics_of(family("llama"), folder / "statistics", ("gram", "kronecker", "fisher"))
    return api.inspect(family("llama"), curvature=folder / "statistics", data=IDS)


def again(folder: Path) -> object:
    """Compress by the recipe that a planned run has written."""
    compressing(partial(family, "llama"), folder, mean_bits=4.0)
    recipe = folder / "out" / "recipe.yaml"
    return api.compress(family("llama"), folder / "again", data=IDS, recipe=recipe), folder / "again"


def cut(model: Callable[[], str | Path], folder: Path, size: str) -> object:
    """Estimate, and cut to a size."""
    statistics_of(model(), folder / "statistics", ("gram", "kronecker"))
    return api.cut(model(), folder / "statistics", folder / "out", size), folder / "out"


def repaired(folder: Path, **arguments: Any) -> object:
    """Compress and repair; of an adapter also what the two together are worth."""
    source, compressed, out = family("llama"), folder / "compressed", folder / "out"
    api.compress(source, compressed, method="gptq", bits=3, group_size=32, data=IDS)
    report = api.repair(source, compressed, out, rank=6, data=IDS, **arguments)
    if arguments.get("format") == "dense":
        return report, out
    return report, out, api.evaluate(compressed, merge_adapter=out, reference=source, data=OTHER_IDS)


def exported(model: Callable[[], str | Path], folder: Path, to: str, needs: str, bits: int | None = None) -> object:
    """Export, dense or after rounding, where what it needs is installed."""
    if importlib.util.find_spec(needs) is None:
        return {"installed": False}
    source = model()
    if bits is not None:
        api.compress(source, folder / "compressed", method="gptq", bits=bits, group_size=32, data=IDS)
        source = folder / "compressed"
    return api.export(source, folder / "out", to), folder / "out"


def writing(verb: Callable[..., Any], model: Callable[[], str | Path], folder: Path, **arguments: Any) -> object:
    """A command that writes a folder from a model."""
    data = {} if "samples" in arguments else {"data": IDS}
    return verb(model(), folder / "out", **data, **arguments), folder / "out"


def looking(verb: Callable[..., Any], model: Callable[[], str | Path], _: Path, **arguments: Any) -> object:
    """A command that writes nothing."""
    return verb(model(), data=IDS, **arguments)


def in_memory(
    verb: Callable[..., Any], build: Callable[[], nn.Module], data: Callable[[], Any], _: Path, **arguments: Any
) -> object:
    """A function of a module and batches."""
    return verb(build(), data(), **arguments)


def on_net(verb: Callable[..., Any], **arguments: Any) -> Callable[[Path], object]:
    """The case of a function of the small network."""
    return partial(in_memory, verb, small_net, images, **arguments)


def add_commands() -> None:
    """Cases on checkpoints."""
    for name in FAMILIES:
        model = partial(family, name)
        for method, constraints in api.METHODS.items():
            options: dict[str, Any] = {"rank": 8} if "low_rank" in constraints else {}
            # Transformers keeps experts in one tensor, which cannot be stored as two factors.
            if name == "qwen2-moe" and constraints == ("low_rank",):
                options["format"] = "dense"
            CASES[f"compress/{name}/{method}"] = partial(compressing, model, method=method, **options)
        CASES[f"narrow/{name}"] = partial(writing, api.narrow, model, keep=0.5)
        for score in ("loss", "cosine", "quadratic"):
            CASES[f"drop-blocks/{name}/{score}"] = partial(writing, api.drop_blocks, model, blocks=1, importance=score)
        CASES[f"estimate/{name}"] = partial(estimated, model, kinds=("gram", "kronecker", "fisher"))
        CASES[f"inspect/{name}"] = partial(looking, api.inspect, model)
        CASES[f"evaluate/{name}"] = partial(looking, api.evaluate, model)
    half, llama, shipped = partial(family, "llama", torch.bfloat16), partial(family, "llama"), default
    variants: dict[str, dict[str, Any]] = {
        "joint": {"method": "sparsegpt", "sparsity": "2:4", "bits": 4, "group_size": 32},
        "asymmetric": {"method": "gptq", "bits": 3, "group_size": 16, "symmetric": False, "act_order": True},
        "input-bits": {"method": "gptq", "bits": 8, "input_bits": 8},
        "ignore": {"method": "kronecker", "ignore": ("down_proj",), "batch_size": 1, "seed": 3},
        "dense": {"method": "kronecker", "format": "dense", "bits": 2, "group_size": 32},
        "measured": {"method": "kronecker", "bits": 3, "measure": True},
        "mean-bits": {"mean_bits": 3.6},
        "loss": {"loss": 0.05},
        "target": {"mean_bits": 6.0, "target": "any"},
        "low-rank-budget": {"size": "70%", "method": "activation-svd", "target": "any"},
        "hawq": {"mean_bits": 3.6, "method": "rtn", "allocation": "hawq"},
        "hawq-v2": {"mean_bits": 3.6, "method": "rtn", "allocation": "hawq-v2"},
    }
    for name, arguments in variants.items():
        CASES[f"compress/llama-bfloat16/{name}"] = partial(compressing, half, **arguments)
    CASES["compress/bert/kronecker"] = partial(compressing, partial(family, "bert-masked"), method="kronecker")
    CASES["compress/minilm/gptq"] = partial(compressing, partial(family, "minilm"), method="gptq")
    for method in ("kronecker", "gptq", "sparsegpt"):
        CASES[f"compress/default/{method}"] = partial(compressing, shipped, method=method, **FEW)
        CASES[f"compress/statistics/{method}"] = partial(compressing_from_statistics, method=method)
    CASES["compress/default/activation-svd"] = partial(compressing, shipped, method="activation-svd", **FEW)
    CASES["compress/default/size"] = partial(compressing, shipped, size="40%", **FEW)
    CASES["compress/recipe"] = again
    CASES["plan/llama"] = partial(looking, api.plan, half, mean_bits=3.6)
    CASES["inspect/statistics"] = inspecting_from_statistics
    CASES["narrow/default"] = partial(writing, api.narrow, shipped, **FEW)
    CASES["drop-blocks/default"] = partial(writing, api.drop_blocks, shipped, blocks=1, **FEW)
    CASES["drop-blocks/share"] = partial(writing, api.drop_blocks, llama, blocks=1, share_rank=4)
    for kind in ("hadamard", "kurtail"):
        CASES[f"rotate/llama/{kind}"] = partial(writing, api.rotate, llama, kind=kind)
    CASES["rotate/default"] = partial(writing, api.rotate, shipped, **FEW)
    for curvature in ("gram", "kronecker", "identity"):
        CASES[f"repair/{curvature}"] = partial(repaired, curvature=curvature)
    CASES["repair/dense"] = partial(repaired, format="dense")
    CASES["cut/llama"], CASES["cut/default"] = partial(cut, llama, size="60%"), partial(cut, shipped, size="60%")
    CASES["estimate/default"] = partial(estimated, shipped, kinds=("gram", "kronecker", "fisher"))
    qwen = partial(family, "qwen2", torch.bfloat16)
    for to, needs in (("gguf", "gguf"), ("onnx", "onnx"), ("torchao", "torchao")):
        CASES[f"export/{to}/dense"] = partial(exported, shipped, to=to, needs=needs)
        CASES[f"export/{to}/4-bit"] = partial(exported, qwen, to=to, needs=needs, bits=4)


# Modules


def add_modules() -> None:
    """Cases on modules in memory."""
    for method, constraints in api.METHODS.items():
        options = {name: value for part in constraints for name, value in NARROW.get(part, {}).items()}
        CASES[f"compress-module/{method}"] = on_net(api.compress_module, method=method, **options)
    more: dict[str, Any] = {"method": "kronecker", "bits": 3, "group_size": 4, "kind": "empirical"}
    CASES["compress-module/attention"] = partial(in_memory, api.compress_module, Attending, images, **more)
    more = {"method": "sparsegpt", "forward": logits}
    gpt2 = partial(language_model, "gpt2")
    CASES["compress-module/gpt2"] = partial(in_memory, api.compress_module, gpt2, tokens, **more)
    for score in SCORES:
        more = {"score": score, "steps": 2, **({"attack": 0.1} if score == "mad" else {})}
        for scope in ("network", "layer"):
            CASES[f"prune-module/{score}/{scope}"] = on_net(api.prune_module, scope=scope, **more)
    variants: dict[str, dict[str, Any]] = {
        **{method: {"method": method} for method in GROUPS},
        **{method: {"method": method, "tolerance": 0.05} for method in ("pagcp", "axformer")},
        "uneven": {"method": "obs", "uniform": False, "amount": 0.4},
        "implanted": {"method": "hap", "implanted": (0.3, 2)},
        "refit": {"method": "magnitude", "refit": True},
    }
    for name, more in variants.items():
        CASES[f"prune-groups/{name}"] = on_net(api.prune_groups, **more)
    for name, kinds, method in (
        ("llama", ["heads"], "fisher"),
        ("gpt2", None, "obs"),
        ("qwen2-moe", ["experts"], "fisher"),
        ("mixtral", ["neurons"], "heapr"),
    ):
        more = {"method": method, "amount": 0.34, "kinds": kinds, "forward": logits}
        build = partial(language_model, name)
        CASES[f"prune-groups/{name}"] = partial(in_memory, api.prune_groups, build, tokens, **more)
    CASES["narrow-heads"] = partial(in_memory, api.narrow_heads, Attending, images, keep=0.5)
    CASES["only-train-once"] = on_net(api.only_train_once, steps=60, rate=0.2, penalty=0.05)
    for method, sparsity in (("magnitude", 0.8), ("obert", 0.8), ("sparsegpt", "2:4")):
        more = {"steps": 12, "cuts": 3, "ignore": ("0",), "calibration": 2}
        CASES[f"prune-gradually/{method}"] = on_net(api.prune_gradually, method=method, sparsity=sparsity, **more)
    for way in WAYS:
        CASES[f"recover/{way}"] = on_net(api.recover, steps=12, way=way, weight="4.weight")
    for sensitivity in ("second-order", "hawq", "hawq-v2", "q-bert", "inter-layer", "q-vlm"):
        CASES[f"allocate/{sensitivity}"] = on_net(api.price, sensitivity=sensitivity)
    for gradients in ("sampled", "empirical", "mean"):
        CASES[f"tiles/{gradients}"] = on_net(api.plan_tiles, kept=0.5, gradients=gradients)


add_commands()
add_modules()
