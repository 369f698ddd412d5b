"""The page of `bench/curvature_peers.py`."""

from typing import Any

from prose import paragraph

NETWORKS = {
    "mlp": "perceptron, 1 million parameters, 1024 samples",
    "conv": "convolutional network, 512 samples of 3 × 32 × 32",
    "llama": "Llama, 128 sequences of 128 tokens",
    "llama_eager": "Llama with attention in plain operations, 16 sequences",
    "llama_sdpa": "Llama with fused attention, as transformers loads it, 16 sequences",
    "small_mlp": "perceptron",
    "small_conv": "convolutions",
    "small_tokens": "tokens",
}
STEPS = {
    "ekfac": "EK-FAC",
    "hessian": "Hessian-vector products",
    "trace": "Trace of the Hessian",
    "gauss_newton": "Gauss-Newton products",
    "diagonal": "Diagonal of the empirical Fisher",
}
NOTES = {
    "ekfac": "The linear layers of the blocks (q, k, v, o, gate, up, down: 4.7 million weights), labels drawn from the "
    "model. The three stages are timed one by one; the total is their sum. kronfluence writes each stage's result to a "
    "file and reads it back, which its time includes. The corrected eigenvalues differ in meaning: kronfluence "
    "squares the gradient of a whole sequence, in the eigenvectors of factors over positions; Hesse does so with the "
    "gradients of positions (`per position`) or of sequences with factors of sequences (`per sample`). The inverse "
    "product is of one gradient of each layer, with damping of 0.1 of the mean eigenvalue. The plain gradient, one "
    "forward and backward pass over the data, is shown for scale.",
    "hessian": "One product over all data, the mean of ten after one to warm up. `keep_graph` and `one batch` keep the "
    "graph of the gradient between products, which takes memory.",
    "trace": "Hutchinson's estimate from 16 random vectors, after one to warm up; making a kept graph is included.",
    "gauss_newton": "The same, for one vector and for eight together.",
    "diagonal": "The mean square of samples' gradients, with the labels of the data.",
}


def page(results: dict[str, Any]) -> str:
    """The tables, with ratios to Hesse."""
    machine = results["machine"]
    lines = [
        "# Curvature compared with other programs",
        "",
        paragraph(
            "Which program computes your curvature fastest, in how much memory, and do the programs agree? "
            "These tables compare Hesse with curvlinops, kronfluence, PyHessian, hessian-eigenthings, BackPACK and "
            "NNGeometry; `python bench/curvature_peers.py` repeats them."
        ),
        "",
        paragraph(
            f"Machine: {machine['processor']}, {machine['threads']} threads, no GPU; Python {machine['python']}, torch "
            f"{machine['torch']} for all. Measured in the same run: matrix product "
            f"{machine['gemm_float32'] / 1e9:.0f} GFLOP/s in float32, memory "
            f"{machine['memory_bandwidth'] / 1e9:.0f} GB/s."
        ),
        "",
        paragraph(
            "Each program has a process and an environment of its own, and runs in float32 on the same weights, data "
            f"and batches. The programs alternate; the fastest of {results['repeats']}. In brackets after seconds: "
            "Hesse's time over the row's, so below 1 Hesse is faster. Memory: the peak of the process above its memory "
            "before the step, and the peak itself, packages included. Difference: of the last product from Hesse's, "
            "relative to its largest entry."
        ),
    ]
    if results["repeats"] < 3:
        lines += ["", "**Provisional: fewer than three repeats, so other work on the machine shows in these seconds.**"]
    for step in STEPS:
        rows = [row for row in results["rows"] if row["step"] == step]
        lines += ["", f"## {STEPS[step]}", "", paragraph(NOTES[step])] if rows else []
        for problem in dict.fromkeys(row["problem"] for row in rows):
            lines += ["", f"{NETWORKS[problem][0].upper()}{NETWORKS[problem][1:]}:", ""]
            lines += _table([row for row in rows if row["problem"] == problem])
    return "\n".join([*lines, "", *_agreement(results["agreement"]), ""])


def _table(rows: list[dict[str, Any]]) -> list[str]:
    own = rows[0]
    names = list(own["seconds"])
    head = ["program", *(f"{name}, s" for name in names), "memory, MB", "peak, MB", "difference"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['program']} | failed: {row['error']}" + " |" * len(head))
            continue
        name, _, variant = row["program"].partition(", ")
        cells = [f"{name} {row['version']}" + (f", {variant}" if variant else "")]
        cells += [f"{row['seconds'][n]:.3f} ({own['seconds'][n] / row['seconds'][n]:.2f})" for n in names]
        cells += [f"{(row['peak'] - row['before']) / 1e6:.0f}", f"{row['peak'] / 1e6:.0f}"]
        cells += [f"{row['difference']:.0e}" if "difference" in row and row is not own else "-"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _agreement(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "## Agreement",
        "",
        paragraph(
            "Small networks in float64 without biases, with the labels of the data: the largest difference between a "
            "program's result and Hesse's, relative to Hesse's largest entry, over all layers. Scales are converted to "
            "Hesse's where they differ (`bench/peers/run_curvature_*.py` describe how). Where weights are shared over "
            "places, curvlinops, kronfluence and NNGeometry correct the eigenvalues of expanded factors with whole "
            "samples' gradients. That is another matrix, and is not compared."
        ),
        "",
        "| quantity | network | program | difference |",
        "|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: row.get("quantity", "")):
        network = NETWORKS[row["problem"]]
        if "error" in row:
            lines.append(f"| failed: {row['error']} | {network} | {row['program']} | |")
        else:
            program = f"{row['program']} {row['version']}"
            lines.append(f"| {row['quantity']} | {network} | {program} | {row['difference']:.0e} |")
    return lines
