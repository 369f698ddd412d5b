"""How fast a larger random model decodes in bfloat16 and in 4 bits, in each runtime: `docs/running.md` shows it.

    python bench/decode_speed.py [--layers 12 --width 1024 --vocabulary 16384] [--out bench/decode_speed.json]

Weights are random, so only speed, memory and the agreement of the runtimes mean anything. The model is a Llama; it is
rounded to nearest in groups of 32, which every runtime's 4-bit form holds exactly.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

import hesse
from hesse.reporting.runtimes import benchmark_summary

HERE = Path(__file__).resolve().parent


def random_llama(folder: Path, layers: int, width: int, vocabulary: int) -> int:
    """Save a random Llama in bfloat16 to `folder`, and return its parameters."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 256,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def main() -> None:
    """Make the model, compress it, and measure both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=16384)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--generate", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--runtimes", default=",".join(("transformers", "llama.cpp", "onnxruntime", "torchao")))
    parser.add_argument("--out", type=Path, default=HERE / "decode_speed.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        dense, compressed = Path(scratch) / "random-llama", Path(scratch) / "random-llama-4bit"
        parameters = random_llama(dense, arguments.layers, arguments.width, arguments.vocabulary)
        ids = torch.randint(arguments.vocabulary, (4, 32), generator=torch.Generator().manual_seed(0)).tolist()
        options = hesse.Options(bits=4, group_size=32)
        hesse.compress(dense, compressed, method="rtn", options=options, data=ids)
        result = hesse.benchmark(
            compressed,
            reference=dense,
            runtimes=arguments.runtimes.split(","),
            prompt=arguments.prompt,
            generate=arguments.generate,
            threads=arguments.threads,
            repeats=arguments.repeats,
        ).report
    Console(width=140).print(benchmark_summary(result))
    content = {"parameters": parameters, **result.to_dict(), "model": "random-llama-4bit", "reference": "random-llama"}
    arguments.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
