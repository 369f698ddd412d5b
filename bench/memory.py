"""Peak memory of compressing models of one block size and more and more blocks, beside the peers, under one limit.

    python bench/memory.py [--sizes 0.1,0.5,1,3] [--method gptq] [--peers llmcompressor,autoround] [--memory 3GiB]

The models are random Llamas, written to disk block by block, so that none is ever whole in memory here. Results are
added to `bench/memory.json`, and printed as a table.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from machine import limits
from run import Case, run_peer
from transformers import LlamaConfig

from hesse.checkpoints.locate import DEFAULT_FOLDER
from hesse.checkpoints.writer import write_tensors

HERE = Path(__file__).resolve().parent
WIDTH, INNER, VOCABULARY = 1536, 4096, 8192
BLOCK = 4 * WIDTH * WIDTH + 3 * WIDTH * INNER + 2 * WIDTH
CASE = Case("4 bit, group 64", "gptq", "gptq", 4, 64)
PEER_LIMIT = 5400  # seconds, after which a peer has not managed


def write_llama(folder: Path, blocks: int) -> int:
    """Write a random Llama in bfloat16, a block at a time; its parameters."""
    folder.mkdir()
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=blocks,
        num_attention_heads=WIDTH // 64,
        num_key_value_heads=WIDTH // 64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    square, wide, tall = (WIDTH, WIDTH), (INNER, WIDTH), (WIDTH, INNER)
    shapes = {f"self_attn.{name}_proj": square for name in "qkvo"}
    shapes |= {"mlp.gate_proj": wide, "mlp.up_proj": wide, "mlp.down_proj": tall}
    weight_map: dict[str, str] = {}

    def write(name: str, tensors: dict[str, torch.Tensor]) -> None:
        write_tensors(folder / name, tensors, {"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))

    def normal(shape: tuple[int, ...]) -> torch.Tensor:
        return (0.02 * torch.randn(shape, generator=generator)).bfloat16()

    ones = torch.ones(WIDTH, dtype=torch.bfloat16)
    write("outside.safetensors", {"model.embed_tokens.weight": normal((VOCABULARY, WIDTH)), "model.norm.weight": ones})
    for number in range(blocks):
        block = f"model.layers.{number}"
        tensors = {f"{block}.{name}.weight": normal(shape) for name, shape in shapes.items()}
        norms = {f"{block}.{name}.weight": ones.clone() for name in ("input_layernorm", "post_attention_layernorm")}
        write(f"block-{number:03d}.safetensors", tensors | norms)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("tokenizer.json", "tokenizer_config.json"):  # the peers will not start without
        shutil.copy(DEFAULT_FOLDER / name, folder)
    return blocks * BLOCK + VOCABULARY * WIDTH + WIDTH


def write_ids(path: Path, samples: int, length: int) -> None:
    """Random tokens."""
    ids = torch.randint(VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(1)).tolist()
    path.write_text("".join(json.dumps({"input_ids": sample}) + "\n" for sample in ids))


def run_hesse(model: Path, ids: Path, out: Path, method: str, memory: str) -> dict[str, Any]:
    """Seconds, peak memory, and the bound that was said before."""
    command = [sys.executable, "-m", "hesse", "compress", str(model), str(out), "--data", str(ids), "--method", method]
    command += ["--bits", str(CASE.bits), "--group-size", str(CASE.group_size), "--memory", memory]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1]}
    report = json.loads((out / "hesse-report.json").read_text())
    said = next(line for line in done.stderr.splitlines() if line.startswith("Memory: "))
    return {
        "seconds_with_io": report["seconds"]["total"],
        "phases": report["seconds"],
        "peak_rss_bytes": report["peak_rss_bytes"],
        "said": said,
    }


def main() -> None:
    """Run everything that was asked for, and add it to the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="0.1,0.5,1,3", help="billions of parameters")
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--peers", default="llmcompressor,autoround")
    parser.add_argument("--memory", default="3GiB")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    arguments = parser.parse_args()
    results = HERE / "memory.json"
    content: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {"rows": []}
    content["machine"] = limits()
    for size in arguments.sizes.split(","):
        with tempfile.TemporaryDirectory() as scratch:
            model, ids = Path(scratch) / "model", Path(scratch) / "ids.jsonl"
            blocks = max(round((float(size) * 1e9 - VOCABULARY * WIDTH) / BLOCK), 1)
            parameters = write_llama(model, blocks)
            write_ids(ids, arguments.samples, arguments.length)
            for program in ("hesse", *filter(None, arguments.peers.split(","))):
                out = Path(scratch) / program
                if program == "hesse":
                    account = run_hesse(model, ids, out, arguments.method, arguments.memory)
                else:
                    account = run_peer(program, CASE, model, ids, out, PEER_LIMIT)
                row = {
                    "program": program,
                    "method": arguments.method if program == "hesse" else CASE.peer_method,
                    "blocks": blocks,
                    "parameters": parameters,
                    "samples": arguments.samples,
                    "length": arguments.length,
                    **account,
                }
                print(json.dumps(row), flush=True)
                same = ("program", "method", "blocks", "samples", "length")
                content["rows"] = [r for r in content["rows"] if any(r[key] != row[key] for key in same)] + [row]
                results.write_text(json.dumps(content, indent=1) + "\n")
    print(table(content["rows"]))


def table(rows: list[dict[str, Any]]) -> str:
    """The results in Markdown."""
    lines = ["| parameters | blocks | samples | program | seconds | peak memory, MB |", "|---|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: (row["parameters"], row["samples"], row["program"])):
        name = f"{row['program']}, {row['method']}"
        shape = f"| {row['parameters'] / 1e9:.2f} billion | {row['blocks']} | {row['samples']} | {name} |"
        if "error" in row:
            lines.append(f"{shape} {row['error']} | |")
        else:
            lines.append(f"{shape} {row['seconds_with_io']:.0f} | {row['peak_rss_bytes'] / 1e6:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
