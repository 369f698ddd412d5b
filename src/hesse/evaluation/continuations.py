"""What the dense and the compressed model write after the same words."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hesse.checkpoints.checkpoint import Checkpoint
from hesse.data import Samples, load_tokenizer, usable_tokenizer
from hesse.errors import DataError
from hesse.evaluation.measurements import Continuation
from hesse.networks.network import Network

PROMPTS = 4
PROMPT_TOKENS = 48
WRITTEN_TOKENS = 40
MEMORY_SHARE = 0.8  # of what is free: weights, the type conversion of the largest of them, and the cache


def continuations(
    dense: Network, written: Checkpoint, check: Samples, step: Callable[[], None]
) -> tuple[list[Continuation], list[str]]:
    """Both models' greedy continuations of pieces of the check samples, each model whole in memory in turn.

    Returns them, and notes: why there are none, or why they are token ids. `step` is called after each model.
    """
    stored = dense.checkpoint.dtype(f"{dense.layers[0].name}.weight")
    needed = sum(p.numel() for p in dense.model.parameters()) * stored.itemsize
    free = _free_memory(dense.device)
    if needed > MEMORY_SHARE * free:
        return [], [
            f"no sample continuations: the whole model takes {needed:,} bytes of memory, and {free:,} bytes are free"
        ]
    prompts = _prompts(check, dense.input_limit)
    first = _write(dense.in_dtype(stored), prompts)
    step()
    second = _write(Network(written, stored, dense.device), prompts)
    step()
    notes, decode = _decoder(dense.checkpoint.folder)
    found = []
    for prompt, ours, theirs in zip(prompts, first, second, strict=True):
        before = decode(prompt.tolist())
        one, other = (decode([*prompt.tolist(), *tokens])[len(before) :] for tokens in (ours, theirs))
        same = _shared(one, other)
        count = max(len(ours), len(theirs))
        found.append(Continuation(before, one[:same], one[same:], other[same:], count, _shared(ours, theirs)))
    return found, notes


def _prompts(check: Samples, limit: int | None) -> list[Tensor]:
    """Pieces (tokens,) of the samples: their beginnings and their middles, in turn, with room for what follows."""
    room = PROMPT_TOKENS if limit is None else min(PROMPT_TOKENS, max(limit - WRITTEN_TOKENS, 1))
    pieces = []
    for part in (0, 1):
        for ids in check.ids:
            half = len(ids) // 2
            pieces.append(ids[part * half :][: min(room, half)])
    return pieces[:PROMPTS]


def _write(network: Network, prompts: list[Tensor]) -> list[list[int]]:
    """The tokens that the model goes on with after each prompt."""
    with network.whole() as model, torch.inference_mode():
        ends = model.config.get_text_config().eos_token_id
        padding = ends[0] if isinstance(ends, list) else ends  # nothing is padded, but generate asks for it
        found = []
        for prompt in prompts:
            ids = prompt[None].to(network.device)
            result = model.generate(  # type: ignore[operator]
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=WRITTEN_TOKENS,
                do_sample=False,
                pad_token_id=padding or 0,
            )
            found.append(result[0, len(prompt) :].tolist())
        return found


def _shared(one: Sequence[object], other: Sequence[object]) -> int:
    """How many of the first items are the same."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def _decoder(folder: Path) -> tuple[list[str], Callable[[list[int]], str]]:
    """How tokens become text: by the model's tokenizer, or as numbers where it has none, with a note that says so."""
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
    """Bytes that the device can still give."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    status = Path("/proc/meminfo")
    if status.exists():  # free, or held by files that can be read again
        line = next(line for line in status.read_text().splitlines() if line.startswith("MemAvailable:"))
        return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
