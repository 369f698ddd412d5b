"""Compress a model with GPTQModel and report the time and the memory it takes.

``seconds`` starts with the dense model in memory and ends when every layer has been compressed and packed: GPTQModel
packs each layer as soon as it is done. ``seconds_with_io`` adds loading the model before it, and writing the packed
checkpoint after it. Importing the packages is in neither.

The packed checkpoint goes to ``OUT/packed``. Loading it takes GPTQModel, so ``OUT`` itself gets the same weights
dequantised to dense ones, which transformers can load; that conversion is in no figure.

The first run on a machine compiles the packing kernel, which needs a C++ compiler and is inside ``seconds``; later runs
take it from a cache. Run a small model once before measuring.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

# The default, half of the cores, is one worker on two cores, and the thread pool refuses to start with fewer than two.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch
from common import Report, copy_tokenizer, parse_arguments, read_ids
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.quantization import GPTQConfig, RTNConfig
from gptqmodel.utils.model_dequant import dequantize_model

METHODS = ("gptq", "rtn")


def calibration_rows(samples: list[list[int]]) -> list[dict[str, list[int]]]:
    """Give every sample with a mask of ones, in the order of the file.

    GPTQModel takes rows with ``input_ids`` without tokenising them. ``quantize`` is then called with no concatenation,
    no sorting, no minimum length and batches of one sample, hence no padding. It would cut samples longer than the
    ``max_position_embeddings`` of the model.
    """
    return [{"input_ids": sample, "attention_mask": [1] * len(sample)} for sample in samples]


def write_dense(packed: Path, out: Path) -> None:
    """Write the dequantised weights of the packed checkpoint as an ordinary checkpoint."""
    dense = out / "dense"
    dequantize_model(packed, dense, target_dtype=torch.bfloat16)
    for file in dense.iterdir():
        if file.name not in ("quantize_config.json", "quant_log.csv"):  # these describe the packed checkpoint
            shutil.move(file, out / file.name)
    shutil.rmtree(dense)


def main() -> None:
    """Run one compression and print the report."""
    arguments = parse_arguments(METHODS, __doc__)
    samples = read_ids(arguments.ids)
    is_rtn = arguments.method == "rtn"
    # Keeping the layers in memory leaves the disk out of the timed part.
    shared: dict[str, Any] = {"bits": arguments.bits, "group_size": arguments.group_size, "sym": True}
    shared |= {"lm_head": False, "offload_to_disk": False}
    config = RTNConfig(**shared) if is_rtn else GPTQConfig(**shared)

    begin = time.perf_counter()
    model = GPTQModel.load(str(arguments.model), config, device="cpu", dtype="auto")
    loaded = time.perf_counter()
    model.quantize(
        None if is_rtn else calibration_rows(samples),
        calibration_concat_size=None,
        calibration_sort=None,
        calibration_data_min_length=0,
        batch_size=1,
        backend=BACKEND.AUTO,
    )
    compressed = time.perf_counter()
    packed = arguments.out / "packed"
    packed.mkdir(parents=True, exist_ok=True)
    model.save(str(packed))
    copy_tokenizer(arguments.model, packed)
    saved = time.perf_counter()

    names = ("damp_percent", "damp_auto_increment", "act_group_aware", "static_groups", "desc_act", "mse")
    settings = shared | {name: getattr(config, name) for name in names if hasattr(config, name)}
    settings |= {"workers": int(os.environ["GPTQMODEL_CPU_WORKERS"]), "dtype": str(model.model.dtype)}
    settings |= {"samples": 0 if is_rtn else len(samples), "length": len(samples[0])}
    report = Report("gptqmodel", arguments.method, compressed - loaded, saved - begin, settings)
    write_dense(packed, arguments.out)
    copy_tokenizer(arguments.model, arguments.out)
    report.emit()


if __name__ == "__main__":
    main()
