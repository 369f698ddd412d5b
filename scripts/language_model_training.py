"""What the scripts that train small language models share: splits, tokenizer, training and the saved folder.

A script gives the texts and a model; `prepare` writes the tokenizer, `calibration.txt` and `held_out.txt` into the
folder, `train` trains, and `save` adds the weights in bfloat16 and `training.json`.
"""

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 4096
LENGTH = 512
END_OF_TEXT = "<|endoftext|>"
TEXT_BYTES = 400_000  # of calibration and of held-out text, each
HELD_OUT_BATCH = 16


@dataclass(frozen=True)
class Tokens:
    """The tokens to train on and those put aside for evaluation, each (tokens,) int64."""

    training: np.ndarray
    held_out: np.ndarray


def split(texts: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Texts by name as train, calibration and held_out: one in thirty for each of the last two, by the name's hash."""
    splits: dict[str, list[str]] = {"train": [], "calibration": [], "held_out": []}
    for name, text in texts:
        bucket = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 30
        splits[{0: "calibration", 1: "held_out"}.get(bucket, "train")].append(text)
    return splits


def excerpt(texts: list[str]) -> str:
    """The first 8,000 characters of each text, until `TEXT_BYTES` are collected: many topics in few bytes."""
    parts, size = [], 0
    for text in texts:
        part = text[:8000].strip() + "\n"
        parts.append(part)
        size += len(part.encode())
        if size >= TEXT_BYTES:
            break
    return "\n".join(parts)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=LENGTH,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    ids: list[int] = []
    for encoding in tokenizer.backend_tokenizer.encode_batch(texts):
        ids.extend(encoding.ids)
        ids.append(0)
    return np.array(ids, dtype=np.int64)


def ngram_perplexity(train: np.ndarray, held_out: np.ndarray, order: int = 3) -> float:
    """Perplexity of an interpolated n-gram model with absolute discounting (Ney, Essen and Kneser, 1994)."""
    discount = 0.75
    counts = [Counter(zip(*(train[i:].tolist() for i in range(n)), strict=False)) for n in range(1, order + 1)]
    continuations: list[Counter[tuple[int, ...]]] = [Counter() for _ in range(order)]
    totals: list[Counter[tuple[int, ...]]] = [Counter() for _ in range(order)]
    for n in range(order):
        for gram, count in counts[n].items():
            continuations[n][gram[:-1]] += 1
            totals[n][gram[:-1]] += count
    log_likelihood = 0.0
    tokens = held_out.tolist()
    for end in range(order, len(tokens)):
        probability = 1 / VOCABULARY
        for n in range(order):
            context, gram = tuple(tokens[end - n : end]), tuple(tokens[end - n : end + 1])
            total = totals[n][context]
            if total:
                kept = max(counts[n][gram] - discount, 0) / total
                probability = kept + discount * continuations[n][context] / total * probability
        log_likelihood += math.log(probability)
    return math.exp(-log_likelihood / (len(tokens) - order))


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, tokens: torch.Tensor) -> float:
    """Nats per token over non-overlapping windows of `LENGTH` tokens."""
    windows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    total = 0.0
    for batch in windows.split(HELD_OUT_BATCH):
        logits = model(batch).logits[:, :-1].float()
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    return total / (windows.shape[0] * (LENGTH - 1))


def learning_rate(peak: float, progress: float) -> float:
    """Warm-up over 2 %, constant, then linear decay to zero over the last 40 %."""
    return peak * min(progress / 0.02, 1.0, (1 - progress) / 0.4)


def prepare(splits: dict[str, list[str]], out: Path) -> Tokens:
    """Train the tokenizer; write it, `calibration.txt` and `held_out.txt` into `out`."""
    tokenizer = train_tokenizer(splits["train"])
    training = encode(tokenizer, splits["train"])
    out.mkdir(parents=True, exist_ok=True)
    for name in ("calibration", "held_out"):
        (out / f"{name}.txt").write_text(excerpt(splits[name]), encoding="utf-8")
    tokenizer.save_pretrained(out)
    held_out = encode(tokenizer, [(out / "held_out.txt").read_text(encoding="utf-8")])
    print(f"{len(training)} training tokens, {len(held_out)} held out", flush=True)
    return Tokens(training, held_out)


def train(
    model: PreTrainedModel,
    tokens: np.ndarray,  # (tokens,)
    generator: np.random.Generator,  # of the order of the windows
    batch_size: int,
    peak_learning_rate: float,
    budget: int,
    minutes: float,
) -> dict[str, int]:
    """Train for `budget` tokens or `minutes`, whichever ends first; the learning rate falls to zero by then.

    The clock starts after the first step, which compiles the model: on a busy machine it would take the warm-up's time.

    Returns:
        `tokens_seen`, and `seconds` by that clock.
    """
    decayed = [p for p in model.parameters() if p.ndim == 2]
    other = [p for p in model.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": other, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        fused=True,
    )

    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(batch[:, :-1]).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())

    compiled = torch.compile(loss_of)
    steps = budget // (batch_size * LENGTH)
    order = np.array([], dtype=np.int64)
    start = time.time()
    step, progress = 0, 0.0
    while progress < 1:
        if len(order) < batch_size:  # a new epoch, its windows shifted by a random offset
            offset = int(generator.integers(LENGTH))
            order = generator.permutation(np.arange(offset, len(tokens) - LENGTH - 1, LENGTH))
        picked, order = order[:batch_size], order[batch_size:]
        batch = torch.from_numpy(np.stack([tokens[i : i + LENGTH + 1] for i in picked]))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(peak_learning_rate, max(progress, 0.5 / steps))
        loss = compiled(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0:
            rate = step * batch_size * LENGTH / (time.time() - start)
            print(f"step {step}/{steps} {progress:.0%} loss {loss.item():.4f} {rate:.0f} tokens/s", flush=True)
        step += 1
        if step == 1:
            start = time.time()
        progress = max(step / steps, (time.time() - start) / (60 * minutes))
    return {"tokens_seen": step * batch_size * LENGTH, "seconds": round(time.time() - start)}


def save(model: PreTrainedModel, tokens: Tokens, out: Path, facts: dict[str, object]) -> None:
    """Write the weights in bfloat16, and `training.json`: the facts given and the quality beside a trigram model."""
    model = model.to(torch.bfloat16)
    model.save_pretrained(out)
    loss = held_out_loss(model.float(), torch.from_numpy(tokens.held_out))
    facts = {
        **facts,
        "training_tokens": len(tokens.training),
        "torch": torch.__version__,
        "held_out_tokens": len(tokens.held_out),
        "held_out_loss": round(loss, 4),
        "held_out_perplexity": round(math.exp(loss), 3),
        "trigram_perplexity": round(ngram_perplexity(tokens.training, tokens.held_out), 2),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    (out / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts, indent=2))
