"""Save and load a curvature as a safetensors file: tensors by name, and their meaning in the file's header."""

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from hesse.checkpoints.writer import write_tensors
from hesse.curvature import Curvature, Origin
from hesse.errors import CheckpointError, UnsupportedProduct, reason
from hesse.version import __version__

KEY = "hesse_curvature"


def save_curvature(curvature: Curvature, path: str | Path) -> None:
    """Write `curvature` to the safetensors file `path`, which appears only when it is complete.

    Raises:
        UnsupportedProduct: the curvature holds something other than tensors and numbers, such as a model.
    """
    tensors: dict[str, Tensor] = {}
    described = _describe(curvature, "", tensors)
    header = {KEY: json.dumps(described), "version": __version__, "format": "pt"}
    # safetensors refuses tensors that share memory.
    write_tensors(Path(path), {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}, header)


def load_curvature(path: str | Path, device: str = "cpu") -> Curvature:
    """Load the curvature in the file `path`, with the type, numbers and tensors that were saved.

    Raises:
        CheckpointError: the file is missing or damaged, or holds no known curvature.
    """
    try:
        with safe_open(path, framework="pt", device=device) as file:
            header = (file.metadata() or {}).get(KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({reason(error)}): estimate it again") from None
    if header is None:
        raise CheckpointError(f"{path} holds tensors but no curvature: give a file that save_curvature wrote")
    try:
        curvature = _restore(json.loads(header), tensors, path)
    except (LookupError, RecursionError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} describes no curvature ({reason(error)}): estimate it again") from None
    if not isinstance(curvature, Curvature):
        raise CheckpointError(f"{path} describes no curvature: estimate it again")
    return curvature


def _describe(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[name] = value.contiguous()
        return {"tensor": name}
    if isinstance(value, Curvature):
        inner = {f.name: _describe(getattr(value, f.name), f"{name}{f.name}", tensors) for f in fields(value)}
        return {"curvature": type(value).__name__, "fields": inner}
    if isinstance(value, Origin):
        return {"origin": asdict(value)}
    if isinstance(value, tuple):
        return {"tuple": [_describe(item, f"{name}.{index}.", tensors) for index, item in enumerate(value)]}
    if isinstance(value, dict):
        return {"dict": {key: _describe(item, f"{name}.{key}.", tensors) for key, item in value.items()}}
    if value is None or isinstance(value, int | float | str):
        return value
    raise UnsupportedProduct(f"a {type(value).__name__} cannot be saved: save what was estimated with it")


def _restore(described: Any, tensors: dict[str, Tensor], path: str | Path) -> Any:
    if not isinstance(described, dict):
        return described
    if "tensor" in described:
        if described["tensor"] not in tensors:
            raise CheckpointError(f"{path} lacks the tensor {described['tensor']}: estimate it again")
        return tensors[described["tensor"]]
    if "origin" in described:
        return Origin(**described["origin"])
    if "tuple" in described:
        return tuple(_restore(item, tensors, path) for item in described["tuple"])
    if "dict" in described:
        return {key: _restore(item, tensors, path) for key, item in described["dict"].items()}
    known = {kind.__name__: kind for kind in _kinds(Curvature)}  # type: ignore[type-abstract]
    name = described["curvature"]
    if name not in known:
        raise CheckpointError(f"{path} holds a {name}, which is not known here: import the module that defines it")
    return known[name](**{key: _restore(value, tensors, path) for key, value in described["fields"].items()})


def _kinds(kind: type[Curvature]) -> list[type[Curvature]]:
    return [kind, *(below for child in kind.__subclasses__() for below in _kinds(child))]
