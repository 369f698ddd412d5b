"""Worker process of a benchmark: it runs this file by its path and imports only the runtime that it measures.

It loads a model, reads a prompt (once to warm up, once timed), and decodes greedily with a key-value cache. Then it
reads the process's peak memory, and last computes the prompt's logits, to compare the runtime with transformers.
"""

import json
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from hesse.progress import peak_memory  # loads no runtime, which would count

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Request:
    """A measurement to make."""

    runtime: str
    path: str  # a checkpoint, or an export of it
    prompt: list[int]
    generate: int
    threads: int
    logits: str | None  # a file for the prompt's logits (tokens, vocabulary)


@dataclass(frozen=True)
class Measurement:
    """Results of one process."""

    load_seconds: float
    prefill: float  # tokens per second
    decode: float  # tokens per second
    peak_memory: int  # bytes


class Session(Protocol):
    """A loaded model with a cache of keys and values."""

    def prefill(self, tokens: list[int]) -> Floats:
        """Clear the cache, read `tokens`, and return the logits of the last token (vocabulary,)."""

    def step(self, token: int) -> Floats:
        """Read one token, and return its logits (vocabulary,)."""

    def all_logits(self, tokens: list[int]) -> Floats:
        """Return the logits of all `tokens` (tokens, vocabulary)."""


class CachedSession(ABC):
    """Session of a model that takes its cache with each call, and returns it."""

    _cache: Any = None  # None: empty

    @abstractmethod
    def _run(self, tokens: list[int], keep: int) -> Floats:
        """Read `tokens`, replace the cache, and return the logits of the last `keep` tokens; of all if it is 0."""

    def prefill(self, tokens: list[int]) -> Floats:
        self._cache = None
        return self.step(*tokens)

    def step(self, *tokens: int) -> Floats:
        return cast(Floats, self._run(list(tokens), 1)[-1])

    def all_logits(self, tokens: list[int]) -> Floats:
        self._cache = None
        return self._run(tokens, 0)


class TorchSession(CachedSession):
    """Session of transformers, with weights of any tensor class."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def _run(self, tokens: list[int], keep: int) -> Floats:
        import torch

        with torch.inference_mode():
            ids = torch.tensor([tokens])
            out = self._model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=keep)
        self._cache = out.past_key_values
        return cast(Floats, out.logits[0].float().numpy())


class LlamaSession:
    """Session of llama.cpp, through llama-cpp-python."""

    def __init__(self, path: Path, threads: int, length: int) -> None:
        from llama_cpp import Llama

        settings: dict[str, Any] = {"n_threads": threads, "n_threads_batch": threads, "verbose": False}
        self._open: Callable[..., Any] = lambda **more: Llama(str(path), n_ctx=length, **settings, **more)
        self._llama = self._open()

    def _eval(self, tokens: list[int]) -> Floats:
        self._llama.eval(tokens)
        logits = self._llama._ctx.get_logits_ith(-1)
        return cast(Floats, np.ctypeslib.as_array(logits, shape=(self._llama.n_vocab(),)).copy())

    def prefill(self, tokens: list[int]) -> Floats:
        self._llama.reset()
        return self._eval(tokens)

    def step(self, token: int) -> Floats:
        return self._eval([token])

    def all_logits(self, tokens: list[int]) -> Floats:
        self._llama = self._open(logits_all=True)
        self._llama.eval(tokens)
        return np.array(self._llama.scores[: len(tokens)])


class OnnxSession(CachedSession):
    """Session of onnxruntime, on a model that `hesse export --to onnx` wrote."""

    def __init__(self, folder: Path, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(folder / "model.onnx", options, ["CPUExecutionProvider"])
        caches = [entry for entry in self._session.get_inputs() if entry.name.startswith("past_key_values.")]
        self._empty = {entry.name: np.zeros((1, entry.shape[1], 0, entry.shape[3]), np.float32) for entry in caches}

    def _run(self, tokens: list[int], keep: int) -> Floats:
        past = self._cache or self._empty
        length = len(tokens) + next(iter(past.values())).shape[2]
        inputs = {
            "input_ids": np.array([tokens], np.int64),
            "attention_mask": np.ones((1, length), np.int64),
            "num_logits_to_keep": np.array(keep, np.int64),
        }
        logits, *present = self._session.run(None, {**inputs, **past})
        self._cache = dict(zip(self._empty, present, strict=True))
        return cast(Floats, logits[0])


def _transformers(path: Path, threads: int, length: int) -> Session:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(
        path, trust_remote_code=False, local_files_only=True, use_safetensors=True
    )
    return TorchSession(model)  # in evaluation mode


def _torchao(path: Path, threads: int, length: int) -> Session:
    import torch

    from hesse.runtimes.torchao_folder import load_torchao

    torch.set_num_threads(threads)
    return TorchSession(load_torchao(path))


def _onnxruntime(path: Path, threads: int, length: int) -> Session:
    return OnnxSession(path, threads)


# Functions of (path, threads, longest sequence in tokens).
OPEN: dict[str, Callable[[Path, int, int], Session]] = {
    "transformers": _transformers,
    "llama.cpp": LlamaSession,
    "onnxruntime": _onnxruntime,
    "torchao": _torchao,
}


def measure(request: Request) -> Measurement:
    """Run the measurement in this process."""
    length = len(request.prompt) + request.generate + 1
    started = time.perf_counter()
    session = OPEN[request.runtime](Path(request.path), request.threads, length)
    loaded = time.perf_counter()
    session.step(int(session.prefill(request.prompt).argmax()))
    began = time.perf_counter()
    token = int(session.prefill(request.prompt).argmax())
    read = time.perf_counter()
    for _ in range(request.generate):
        token = int(session.step(token).argmax())
    ended = time.perf_counter()
    peak = peak_memory()
    if request.logits is not None:
        np.save(request.logits, session.all_logits(request.prompt))
    return Measurement(loaded - started, len(request.prompt) / (read - began), request.generate / (ended - read), peak)


def main() -> None:
    """Read the request, and write the measurement next to it."""
    path = Path(sys.argv[1])
    request = Request(**json.loads(path.read_text(encoding="utf-8")))
    path.with_suffix(".result").write_text(json.dumps(asdict(measure(request))), encoding="utf-8")


if __name__ == "__main__":
    main()
