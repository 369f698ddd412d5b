"""Train the language models that check the benchmarks: other architectures and other text than the default model's.

    python bench/train_models.py prose OUT --text FOLDER [FOLDER ...] --minutes 40
    python bench/train_models.py c-source OUT --text FOLDER [FOLDER ...] --minutes 40

`prose` is a Qwen3 on the paragraphs of HTML pages in English: usr/share/doc/{linux-doc-6.1,python3.11,
postgresql-doc-15,git-doc,debian-policy} of the Debian 12 packages linux-doc-6.1, python3.11-doc, postgresql-doc-15,
git-doc and debian-policy. `c-source` is a GPT-NeoX on the .c and .h files of Linux: kernel, mm, lib, block and ipc of
the archive that linux-source-6.1 holds. `apt-get download PACKAGE`, `dpkg-deb -x PACKAGE.deb FOLDER` and `tar -xf`
give the texts.

A text that occurs twice is taken once. OUT is a folder as `scripts/train_default_model.py` writes it, with
`ids.jsonl` beside: the calibration tokens of the benchmarks.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import torch
from run import LENGTH as SAMPLE_LENGTH
from run import SAMPLES
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from hesse.data import read_samples

sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts"))
from language_model_training import LENGTH, VOCABULARY, prepare, save, split, train

BATCH = 4
PEAK_LEARNING_RATE = 2e-3
COMMON = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": LENGTH,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
SENTENCE_ENDS = (".", ":", "?", "!")


class _Paragraphs(HTMLParser):
    """Collects the paragraphs that end as a sentence does, and so leaves out menus, tables and signatures."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[str] = []
        self.inside = False
        self.parts: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag == "p":
            self._end()  # HTML lets </p> be left out
            self.inside = True

    def handle_endtag(self, tag: str) -> None:
        if tag == "p":
            self._end()

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.parts.append(data)

    def _end(self) -> None:
        text = " ".join("".join(self.parts).split())
        if text.endswith(SENTENCE_ENDS) and not text.startswith("©"):
            self.kept.append(text)
        self.inside, self.parts = False, []


def prose(page: str) -> str:
    """The paragraphs of an HTML page, an empty line between them."""
    parser = _Paragraphs()
    parser.feed(page)
    parser.close()
    return "\n\n".join(parser.kept)


def source(file: str) -> str:
    """A source file as it is."""
    return file


def qwen3() -> PreTrainedModel:
    """5.7 million parameters: query and key norms, grouped queries of another width than the model's, tied head."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            **COMMON,
            hidden_size=320,
            intermediate_size=896,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            tie_word_embeddings=True,
        )
    )


def gpt_neox() -> PreTrainedModel:
    """6.0 million parameters: layer norms, biases, attention and GELU network in parallel, a head of its own."""
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            **COMMON,
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=5,
            num_attention_heads=4,
            use_parallel_residual=True,
            tie_word_embeddings=False,
        )
    )


@dataclass(frozen=True)
class Recipe:
    """One model: its network, and what it reads."""

    build: Callable[[], PreTrainedModel]
    text: str  # what training.json calls it
    suffixes: tuple[str, ...]
    extract: Callable[[str], str]


RECIPES = {
    "prose": Recipe(qwen3, "English technical documentation of Debian 12", (".html",), prose),
    "c-source": Recipe(gpt_neox, "C source of Linux 6.1", (".c", ".h"), source),
}


def read_texts(folders: list[Path], recipe: Recipe) -> Iterator[tuple[str, str]]:
    """The path and the text of each file, equal texts once and translations not at all."""
    seen: set[bytes] = set()
    for folder in folders:
        for path in sorted(p for p in folder.rglob("*") if p.suffix in recipe.suffixes and p.is_file()):
            if "translations" in path.parts:
                continue
            text = recipe.extract(path.read_text(encoding="utf-8", errors="replace"))
            digest = hashlib.sha256(text.encode()).digest()
            if text and digest not in seen:
                seen.add(digest)
                yield f"{folder.name}/{path.relative_to(folder).as_posix()}", text


def write_ids(model: Path) -> None:
    """`ids.jsonl`: the samples that the benchmarks calibrate on, drawn from `calibration.txt`."""
    samples, _ = read_samples(
        str(model / "calibration.txt"),
        model,
        count=SAMPLES,
        length=SAMPLE_LENGTH,
        seed=0,
        purpose="calibration",
        limit=None,
    )
    lines = "".join(json.dumps({"input_ids": sample.tolist()}) + "\n" for sample in samples.ids)
    (model / "ids.jsonl").write_text(lines)


def main() -> None:
    """Train one of the models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=RECIPES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="folders of files to read")
    parser.add_argument("--tokens", type=int, default=20_000_000)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    arguments = parser.parse_args()
    recipe = RECIPES[arguments.name]
    torch.manual_seed(0)
    tokens = prepare(split(read_texts(arguments.text, recipe)), arguments.out)
    write_ids(arguments.out)
    model = recipe.build()
    generator = np.random.default_rng(len(tokens.training))
    done = train(model, tokens.training, generator, BATCH, PEAK_LEARNING_RATE, arguments.tokens, arguments.minutes)
    save(model, tokens, arguments.out, {"text": recipe.text, **done})


if __name__ == "__main__":
    main()
