"""Runtimes: the packages that each one needs, and the form of a model that it loads."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from hesse.checkpoints.files import read_json
from hesse.errors import OptionError
from hesse.runtimes.export import EXPORT_TARGETS


@dataclass(frozen=True)
class Runtime:
    """A program that runs language models on this machine."""

    name: str
    module: str  # the module that runs it
    distribution: str  # the package that gives its version
    install: str
    target: str | None  # the export target that it loads; None: it loads the checkpoint itself
    compressed_only: bool = False  # for a dense model it would be transformers itself

    def missing(self) -> str | None:
        """Return which packages are missing and how to install them; None if none is."""
        exporter = () if self.target is None else EXPORT_TARGETS[self.target].packages
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
    """Return the named runtimes; transformers comes first because the others are compared with it.

    Raises:
        OptionError: there is no runtime of a given name.
    """
    unknown = [name for name in names if name not in RUNTIMES]
    if unknown or not names:
        raise OptionError(f"there is no runtime {', '.join(unknown)!r}; there are {', '.join(RUNTIMES)}")
    return [runtime for name, runtime in RUNTIMES.items() if name in names]


def describe_storage(model: Path) -> str:
    """Return a short description of the storage of a checkpoint's layers, such as "4 bit" or "bfloat16"."""
    config = read_json(model / "config.json")
    quantization = config.get("quantization_config")
    groups = quantization.get("config_groups") if isinstance(quantization, dict) else None
    schemes = [group.get("weights") for group in groups.values() if isinstance(group, dict)] if groups else []
    bits = {f"{weights.get('num_bits')} bit" for weights in schemes if isinstance(weights, dict)}
    if bits:
        return ", ".join(sorted(bits))
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")
