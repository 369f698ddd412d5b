"""Generate continuations of the same prompts by the dense and the compressed model."""

from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import torch
from torch import Tensor

from hesse.checkpoints.checkpoint import Checkpoint
from hesse.curvature.losses import input_ids
from hesse.data import Samples, load_tokenizer, usable_tokenizer
from hesse.errors import DataError
from hesse.evaluation.measurements import Continuation
from hesse.networks.network import CheckpointNetwork

PROMPTS = 4
PROMPT_TOKENS = 48
GENERATED_TOKENS = 40
MEMORY_SHARE = 0.8  # of free memory; the rest is for the cache and the type conversion of the largest weight


def continuations(
    dense: CheckpointNetwork, compressed: Checkpoint, check: Samples, step: Callable[[], None]
) -> tuple[list[Continuation], list[str]]:
    """Return both models' greedy continuations of pieces of the check samples; one model at a time is in memory.

    Also returns notes: why there are no continuations, or why they are token ids. `step` is called after each model.
    """
    stored = dense.tensors.dtype(f"{dense.layers[0].name}.weight")
    needed = sum(p.numel() for p in dense.model.parameters()) * stored.itemsize
    free = _free_memory(dense.device)
    if needed > MEMORY_SHARE * free:
        return [], [
            f"no sample continuations: the whole model takes {needed:,} bytes of memory, but {free:,} bytes are free"
        ]
    prompts = _prompts(check, dense.input_limit)
    first = _generate(dense.in_dtype(stored), prompts)
    step()
    second = _generate(CheckpointNetwork(compressed, stored, dense.device), prompts)
    step()
    notes, decode = _decoder(dense.checkpoint.folder)
    pairs = []
    for prompt, ours, theirs in zip(prompts, first, second, strict=True):
        before = decode(prompt.tolist())
        one, other = (decode([*prompt.tolist(), *tokens])[len(before) :] for tokens in (ours, theirs))
        same = _common_prefix(one, other)
        count = max(len(ours), len(theirs))
        pairs.append(Continuation(before, one[:same], one[same:], other[same:], count, _common_prefix(ours, theirs)))
    return pairs, notes


def _prompts(check: Samples, limit: int | None) -> list[Tensor]:
    """Return pieces (tokens,) of the samples: all beginnings, then all middles, with room for the continuation."""
    room = PROMPT_TOKENS if limit is None else min(PROMPT_TOKENS, max(limit - GENERATED_TOKENS, 1))
    halves = [(input_ids(ids), len(ids) // 2) for ids in check.ids]
    pieces = [ids[part * half :][: min(room, half)] for part in (0, 1) for ids, half in halves]
    return pieces[:PROMPTS]


def _generate(network: CheckpointNetwork, prompts: list[Tensor]) -> list[list[int]]:
    """Return the tokens that the model generates after each prompt."""
    with network.whole() as model, torch.inference_mode():
        ends = model.config.get_text_config().eos_token_id
        padding = ends[0] if isinstance(ends, list) else ends  # nothing is padded, but generate requires it
        continued = []
        for prompt in prompts:
            ids = prompt[None].to(network.device)
            result = model.generate(  # type: ignore[operator]
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=GENERATED_TOKENS,
                do_sample=False,
                pad_token_id=padding or 0,
            )
            continued.append(result[0, len(prompt) :].tolist())
        return continued


def _common_prefix(one: Sequence[object], other: Sequence[object]) -> int:
    """Return the length of the common prefix."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))


def _decoder(folder: Path) -> tuple[list[str], Callable[[list[int]], str]]:
    """Return notes and a function from tokens to text: the model's tokenizer, or numbers and a note without one."""
    try:
        tokenizer = load_tokenizer(folder)
    except DataError:
        return ["continuations are token ids: the model's folder has no tokenizer"], lambda ids: "".join(
            f"{token} " for token in ids
        )

    def decode(ids: list[int]) -> str:
        with usable_tokenizer(folder):
            return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    return [], decode


def _free_memory(device: torch.device) -> int:
    """Return the free memory of the device, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)  # memory that caches of files hold counts as free
