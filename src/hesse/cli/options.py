"""The arguments and options that commands share: one wording, one type."""

from pathlib import Path
from typing import Annotated

import typer

ModelArgument = Annotated[str, typer.Argument(help="A model folder, `default`, or a hub id such as owner/name.")]
OutArgument = Annotated[Path, typer.Argument(help="The folder to write.")]
ReferenceOption = Annotated[str | None, typer.Option(help="The dense model to compare with.")]
IgnoreOption = Annotated[list[str] | None, typer.Option(help="Pattern of layers to leave alone; may be repeated.")]
DataOption = Annotated[
    str | None,
    typer.Option(
        help="Text: .txt, .jsonl with `text` or `input_ids`, .parquet, or a datasets id. The shipped text if absent."
    ),
]
SamplesOption = Annotated[int, typer.Option(help="Calibration samples.")]
LengthOption = Annotated[
    int | None, typer.Option(help="Tokens a sample; 2048, or as many as the model has positions for, if absent.")
]
SeedOption = Annotated[int, typer.Option(help="Of the choice of samples and of sampled labels.")]
BatchOption = Annotated[int | None, typer.Option(help="Samples that go through the model together.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace the model folder OUT.")]
RestartOption = Annotated[
    bool, typer.Option("--restart", help="Discard what an interrupted run to OUT has done, rather than resume it.")
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Say what the run would take: bytes, memory and time. Write nothing.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, and nothing else.")]
