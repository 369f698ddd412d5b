"""Train the default model that Hesse ships: a small Llama on the source of the Python standard library.

    python scripts/train_default_model.py OUT --tokens 20000000 [--minutes 60] [--resume FOLDER --seen TOKENS]

Reads the standard library of the interpreter that runs it (tests included, site-packages not), puts aside
one file in thirty for calibration and one in thirty for evaluation (chosen by a hash of the path, so that
the choice does not move), trains a byte-level BPE tokenizer and a Llama on the rest, and writes OUT as a
Hugging Face folder in bfloat16 with `calibration.txt`, `held_out.txt` and `training.json`.
"""

import argparse
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from language_model_training import LENGTH, VOCABULARY, prepare, save, split, train
from transformers import LlamaConfig, LlamaForCausalLM

BATCH = 16
PEAK_LEARNING_RATE = 3e-3
CONFIG = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTH,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def library_sources() -> Iterator[tuple[str, str]]:
    """The path and the text of each of the standard library's source files."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if "site-packages" in name:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a few tests are deliberately in other encodings
        yield name, text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=20_000_000)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--resume", type=Path, help="a model that this script saved, to go on from")
    parser.add_argument("--seen", type=int, default=0, help="tokens that the resumed model had seen")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    tokens = prepare(split(library_sources()), arguments.out)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    if arguments.resume is not None:
        model.load_state_dict(LlamaForCausalLM.from_pretrained(arguments.resume, dtype=torch.float32).state_dict())
    generator = np.random.default_rng(len(tokens.training) + (arguments.resume is not None))
    done = train(model, tokens.training, generator, BATCH, PEAK_LEARNING_RATE, arguments.tokens, arguments.minutes)
    facts = {
        "text": f"source of the Python {platform.python_version()} standard library",
        "tokens_seen": arguments.seen + done["tokens_seen"],
        "seconds": done["seconds"],
    }
    save(model, tokens, arguments.out, facts)


if __name__ == "__main__":
    main()
