"""The arguments and options that several commands share: one name, one type, one help text."""

from pathlib import Path
from typing import Annotated

import typer

from hesse.options import help_of

MODEL = "A model folder, `default`, or a hub id such as owner/name."
ModelArgument = Annotated[str, typer.Argument(help=MODEL, metavar="MODEL")]
OUT = "The folder to write."
OutArgument = Annotated[Path, typer.Argument(help=OUT, metavar="OUT")]
AnyOutArgument = Annotated[Path | None, typer.Argument(help=OUT, metavar="OUT")]

# Groups of options in the help of a command.
SMALLER, METHOD, CALIBRATION, OUTPUT, MACHINE = "How small", "Options of methods", "Calibration", "Output", "Machine"

DataOption = Annotated[
    str | None,
    typer.Option(
        help="Text: a .txt, .jsonl (`text` or `input_ids`) or .parquet file, or a datasets id.",
        show_default="the shipped text",
        rich_help_panel=CALIBRATION,
    ),
]
SAMPLES = "Number of samples."
SamplesOption = Annotated[int, typer.Option(help=SAMPLES, rich_help_panel=CALIBRATION)]
AllSamplesOption = Annotated[int | None, typer.Option(help=SAMPLES, show_default="all", rich_help_panel=CALIBRATION)]
LENGTH = "Tokens per sample, at most as many as the model has positions for."
LengthOption = Annotated[int | None, typer.Option(help=LENGTH, show_default="2048", rich_help_panel=CALIBRATION)]
ShortLengthOption = Annotated[int, typer.Option(help=LENGTH, rich_help_panel=CALIBRATION)]
SeedOption = Annotated[int, typer.Option(help="Random seed.", rich_help_panel=CALIBRATION)]
BatchOption = Annotated[
    int | None,
    typer.Option(
        help="Samples per batch; changes memory and time, not the result.",
        show_default="as many as fit",
        rich_help_panel=CALIBRATION,
    ),
]
StatisticsOption = Annotated[
    Path | None,
    typer.Option(
        help="A folder that `hesse estimate` wrote of the model, used instead of calibration.",
        rich_help_panel=CALIBRATION,
    ),
]

SIZE = "Size to reach: a share of the dense bytes such as 40%, or a size such as 5MB."
SizeOption = Annotated[str | None, typer.Option(help=SIZE, rich_help_panel=SMALLER)]
LossOption = Annotated[
    float | None,
    typer.Option(
        help="Make the model as small as this loss increase allows, in nats per token.", rich_help_panel=SMALLER
    ),
]
RankOption = Annotated[int, typer.Option(help=help_of("rank"))]
DampingOption = Annotated[float, typer.Option(help=help_of("damping"))]
IgnoreOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Layers to leave unchanged: a pattern such as '*.down_proj', or 're:' and a regular expression; may be "
        "repeated."
    ),
]
CurvatureOption = Annotated[
    str, typer.Option(help="Curvature by name: gram, kronecker, fisher (estimate; with commas) or identity (repair).")
]

FormatOption = Annotated[
    str,
    typer.Option(
        help="Format of OUT: auto, pack-quantized, int-quantized, low-rank or dense (compress); adapter or dense "
        "(repair).",
        rich_help_panel=OUTPUT,
    ),
]
ReferenceOption = Annotated[str | None, typer.Option(help="The dense model to compare with.")]
ReportOption = Annotated[
    Path | None,
    typer.Option(help="Also write an HTML page with tables and plots to this file.", rich_help_panel=OUTPUT),
]
OverwriteOption = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace what the command writes, if it exists.", rich_help_panel=OUTPUT),
]
RestartOption = Annotated[
    bool,
    typer.Option(
        "--restart",
        help="Discard an unfinished run that was to write OUT, instead of resuming it.",
        rich_help_panel=OUTPUT,
    ),
]
DryRunOption = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Print what the run would take (bytes, disk, memory, time), and write nothing.",
        rich_help_panel=OUTPUT,
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print JSON on standard output, and nothing else.", rich_help_panel=OUTPUT)
]

DeviceOption = Annotated[str, typer.Option(help="The device: auto, cpu or cuda.", rich_help_panel=MACHINE)]
MemoryOption = Annotated[
    str | None,
    typer.Option(
        help="Upper bound of the memory to use, such as 8GiB.",
        show_default="most of what is free",
        rich_help_panel=MACHINE,
    ),
]
