"""The runtimes, the packages that they need, and what each of them loads."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from hesse.checkpoints.files import read_json
from hesse.errors import OptionError
from hesse.runtimes.export import TARGETS


@dataclass(frozen=True)
class Runtime:
    """A program that runs language models on this machine."""

    name: str
    module: str  # that is imported to run it
    distribution: str  # whose version is its own
    install: str
    target: str | None  # what to export to for it; None: it loads the checkpoint itself
    compressed_only: bool = False  # it is transformers itself where the model is dense

    def missing(self) -> str | None:
        """What to install, if anything."""
        exporter = () if self.target is None else TARGETS[self.target].packages
        absent = [name for name in dict.fromkeys((self.module, *exporter)) if find_spec(name) is None]
        return f"{' and '.join(absent)} not installed: {self.install}" if absent else None


RUNTIMES = {
    runtime.name: runtime
    for runtime in (
        Runtime("transformers", "transformers", "transformers", "pip install transformers", None),
        Runtime("llama.cpp", "llama_cpp", "llama-cpp-python", "pip install 'hesse[gguf]' llama-cpp-python", "gguf"),
        Runtime("onnxruntime", "onnxruntime", "onnxruntime", "pip install 'hesse[onnx]'", "onnx"),
        Runtime("torchao", "torchao", "torchao", "pip install 'hesse[torchao]'", "torchao", compressed_only=True),
    )
}


def find_runtimes(names: list[str]) -> list[Runtime]:
    """The runtimes of those names, transformers first since the others are compared with it.

    Raises:
        OptionError: there is none of that name.
    """
    unknown = [name for name in names if name not in RUNTIMES]
    if unknown or not names:
        raise OptionError(f"there is no runtime {', '.join(unknown)!r}; there are {', '.join(RUNTIMES)}")
    return [runtime for name, runtime in RUNTIMES.items() if name in names]


def storage(model: Path) -> str:
    """How most layers of a checkpoint are stored, in a few words."""
    config = read_json(model / "config.json")
    quantization = config.get("quantization_config")
    groups = quantization.get("config_groups") if isinstance(quantization, dict) else None
    schemes = [group.get("weights") for group in groups.values() if isinstance(group, dict)] if groups else []
    bits = {f"{weights.get('num_bits')} bit" for weights in schemes if isinstance(weights, dict)}
    if bits:
        return ", ".join(sorted(bits))
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")
