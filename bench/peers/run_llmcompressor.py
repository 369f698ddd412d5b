"""Compress a model with llm-compressor and report the time and the memory it takes.

``seconds`` covers the one-shot call alone: it starts with the dense model in memory and ends when every weight has
been compressed in place, still in its dense layout. ``seconds_with_io`` adds loading the model before it, and packing
and writing the checkpoint after it. Importing the packages is in neither.

Quantised checkpoints are written in the pack-quantized format of compressed-tensors, pruned ones as dense weights.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from common import Report, copy_tokenizer, parse_arguments, read_ids
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForCausalLM, AutoTokenizer

METHODS = ("gptq", "rtn", "sparsegpt", "wanda")
# A pattern, not the plain name: the pruning modifiers look the layer up as "lm_head.", which the plain name would miss.
IGNORE = ["re:.*lm_head", "re:.*embed_out"]


def calibration_loader(samples: list[list[int]], batch_size: int) -> DataLoader[Any]:
    """Serve the samples in the order of the file.

    ``oneshot`` takes a ``DataLoader`` as it is: its own path from a dataset, with tokenising, shuffling, truncation
    and the limit on the number of samples, is not entered.
    """
    rows = TensorDataset(torch.tensor(samples))

    def together(batch: list[tuple[torch.Tensor, ...]]) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.stack([row for (row,) in batch])}

    return DataLoader(rows, batch_size=batch_size, shuffle=False, collate_fn=together)


def build_modifier(method: str, bits: int, group_size: int, fraction: float, pattern: str | None) -> Modifier:
    """Build the modifier of a method, with the peer's defaults for all that the command line does not set."""
    if method in ("gptq", "rtn"):
        weights = QuantizationArgs(num_bits=bits, type="int", symmetric=True, strategy="group", group_size=group_size)
        groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
        modifier = GPTQModifier if method == "gptq" else QuantizationModifier
        return modifier(config_groups=groups, ignore=IGNORE)
    pruner = SparseGPTModifier if method == "sparsegpt" else WandaPruningModifier
    return pruner(sparsity=fraction, mask_structure=pattern or "0:0", targets=["Linear"], ignore=IGNORE)


def describe(modifier: Modifier) -> dict[str, Any]:
    """Return the settings which decide about the result, as the modifier resolved them."""
    names = ("block_size", "dampening_frac", "actorder", "sparsity", "mask_structure")
    settings = {name: getattr(modifier, name) for name in names if hasattr(modifier, name)}
    config = getattr(modifier, "resolved_config", None)
    if config is not None:
        weights = config.config_groups["group_0"].weights
        settings |= weights.model_dump(mode="json", include={"num_bits", "group_size", "symmetric", "observer"})
        settings["actorder"] = weights.model_dump(mode="json")["actorder"]
    return settings


def main() -> None:
    """Run one compression and print the report."""
    arguments = parse_arguments(METHODS, __doc__)
    samples = read_ids(arguments.ids)
    sparsity = arguments.sparsity
    modifier = build_modifier(
        arguments.method, arguments.bits, arguments.group_size, sparsity.fraction, sparsity.pattern
    )

    begin = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto", device_map=None)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    loaded = time.perf_counter()
    # Plain rounding has no use for data, and without any the peer takes its data-free pipeline.
    dataset = None if arguments.method == "rtn" else calibration_loader(samples, arguments.batch_size)
    oneshot(model=model, tokenizer=tokenizer, recipe=modifier, dataset=dataset)
    compressed = time.perf_counter()
    model.save_pretrained(arguments.out, save_compressed=True)
    copy_tokenizer(arguments.model, arguments.out)
    saved = time.perf_counter()

    settings = {**describe(modifier), "samples": len(samples) if dataset is not None else 0, "length": len(samples[0])}
    Report("llmcompressor", arguments.method, compressed - loaded, saved - begin, settings).emit()


if __name__ == "__main__":
    main()
