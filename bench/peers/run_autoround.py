"""Compress a model with AutoRound and report the time and the memory it takes.

``seconds`` starts with the dense model in memory and covers the set-up of AutoRound, the capture of the inputs of
every block and the optimisation; it ends when each block holds its rounded weights, still in their dense layout.
``seconds_with_io`` adds loading the model before it, and packing and writing the checkpoint after it. Importing the
packages is in neither.

Checkpoints are written in the pack-quantized format of compressed-tensors (``llm_compressor`` in AutoRound).
"""

from __future__ import annotations

import time
from typing import Any

import torch
from auto_round import AutoRound
from auto_round.algorithms.quantization.rtn.config import RTNConfig
from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig
from common import Report, copy_tokenizer, parse_arguments, read_ids
from transformers import AutoModelForCausalLM, AutoTokenizer

METHODS = ("autoround", "rtn")
FORMAT = "llm_compressor"
BATCH_SIZE = 8


def calibration_batches(samples: list[list[int]]) -> list[dict[str, torch.Tensor]]:
    """Make one batch of every sample, in the order of the file.

    AutoRound iterates over a list of tensors as it is, without tokenising or shuffling. It drops samples shorter than
    ``seqlen`` and stops after ``nsamples``, so these two are set to the length and the number of the samples. The
    mask of ones stops it from masking the tokens which equal the padding token.
    """
    ids = torch.tensor(samples)
    return [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in ids]


def main() -> None:
    """Run one compression and print the report."""
    arguments = parse_arguments(METHODS, __doc__)
    samples = read_ids(arguments.ids)
    is_rtn = arguments.method == "rtn"

    begin = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    # AutoRound leaves tokens which equal the padding token out of its loss; the samples have no padding, but the
    # padding token may well be the end of text, which does occur in them.
    tokenizer.pad_token = None
    loaded = time.perf_counter()
    scheme: dict[str, Any] = {
        "bits": arguments.bits,
        "group_size": arguments.group_size,
        "sym": True,
        "data_type": "int",
        "act_bits": 16,
    }
    rounder = AutoRound(
        model,
        tokenizer,
        scheme=scheme,
        alg_configs=RTNConfig(disable_opt_rtn=True) if is_rtn else SignRoundConfig(iters=arguments.iterations),
        dataset=calibration_batches(samples),
        seqlen=len(samples[0]),
        nsamples=len(samples),
        batch_size=BATCH_SIZE,
        device_map="cpu",
        low_cpu_mem_usage=False,  # keep the blocks in memory instead of writing them to disk during the timed part
        enable_torch_compile=False,
        quant_lm_head=False,
    )
    rounder.quantize()
    compressed = time.perf_counter()
    rounder.save_quantized(str(arguments.out), format=FORMAT, inplace=True)
    copy_tokenizer(arguments.model, arguments.out)
    saved = time.perf_counter()

    settings = scheme | {
        "iterations": 0 if is_rtn else arguments.iterations,
        "batch_size": BATCH_SIZE,
        "low_cpu_mem_usage": False,
        "format": FORMAT,
        "samples": 0 if is_rtn else len(samples),
        "length": len(samples[0]),
    }
    Report("auto-round", arguments.method, compressed - loaded, saved - begin, settings).emit()


if __name__ == "__main__":
    main()
