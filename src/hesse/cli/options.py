"""The arguments and options that several commands share: one name, one type, one help text."""

import inspect
from collections.abc import Callable
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from hesse.options import KNOWN, Options, flag, help_of, opposite

MODEL = "A model folder, `default`, or a hub id such as owner/name."
ModelArgument = Annotated[str, typer.Argument(help=MODEL, metavar="MODEL")]
OUT = "The folder to write."
OutArgument = Annotated[Path, typer.Argument(help=OUT, metavar="OUT")]
AnyOutArgument = Annotated[Path | None, typer.Argument(help=OUT, metavar="OUT")]

# Groups of options in the help of a command.
SMALLER, METHOD, CALIBRATION, OUTPUT, MACHINE = "How small", "Options of methods", "Calibration", "Output", "Machine"

LossOption = Annotated[
    float | None,
    typer.Option(
        help="Make the model as small as this loss increase allows, in nats per token.", rich_help_panel=SMALLER
    ),
]
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
ReferenceOption = Annotated[str | None, typer.Option(help="The dense model to compare with.")]


def with_options(*shared: Parameter) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options `shared` after its own; it takes them by name or as `**shared`."""
    options = {parameter.name: parameter for parameter in shared}

    def give(run: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(run)
        own = [p for name, p in signature.parameters.items() if name not in options and p.kind != Parameter.VAR_KEYWORD]
        run.__signature__ = signature.replace(parameters=[*own, *shared])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in (*own, *shared)} | {"return": None}
        return run

    return give


def _shared(
    name: str, kind: Any, default: Any, panel: str, help: str, *flags: str, shown: str | bool = True, **settings: Any
) -> Parameter:
    option = typer.Option(*flags, help=help, rich_help_panel=panel, show_default=shown, **settings)
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])


def _method_option(name: str) -> Parameter:
    """Return the option of one field of `Options`, which is None if it is not given."""
    kinds = get_args(get_type_hints(Options)[name])
    kind = str if str in kinds else kinds[0]
    flags = [f"{flag(name)}/{opposite(name)}"] if kind is bool else []
    return _shared(name, kind | None, None, METHOD, help_of(name), *flags)


def samples(default: int | None, shown: str | bool = True) -> Parameter:
    """Return --samples with a default; `shown` describes it in the help."""
    return _shared(
        "samples",
        int | None,
        default,
        CALIBRATION,
        "Number of samples, or all of them if the data has fewer.",
        shown=shown,
    )


def length(default: int | None, shown: str | bool = True) -> Parameter:
    """Return --length with a default; `shown` describes it in the help."""
    text = "Tokens per sample, at most as many as the model has positions for."
    return _shared("length", int | None, default, CALIBRATION, text, shown=shown)


METHOD_OPTIONS = {option.name: _method_option(option.name) for option in KNOWN}
SETTING = _shared(
    "setting",
    list[str] | None,
    None,
    METHOD,
    "Option of a method from another package; may be repeated.",
    "--set",
    metavar="NAME=VALUE",
)

DATA = _shared(
    "data",
    str | None,
    None,
    CALIBRATION,
    "Text, chats or token ids: a .txt, .jsonl, .json, .csv or .parquet file, a folder of them, a datasets id, or a "
    "mixture such as a.jsonl,b.jsonl:0.3.",
    shown="the shipped text",
)
STATISTICS = _shared(
    "statistics",
    Path | None,
    None,
    CALIBRATION,
    "A folder that `hesse estimate` wrote of the model, used instead of calibration.",
)
LENGTH = length(None, "2048")
BOS = _shared(
    "bos",
    bool | None,
    None,
    CALIBRATION,
    "Start windows of text with the BOS token, or not.",
    "--bos/--no-bos",
    shown="as the tokenizer adds it",
)
SEED = _shared("seed", int, 0, CALIBRATION, "Random seed.")
BATCH_SIZE = _shared(
    "batch_size",
    int | None,
    None,
    CALIBRATION,
    "Samples per batch; changes memory and time, not the result.",
    shown="as many as fit",
)

FORMAT = "Format of OUT: auto, pack-quantized, int-quantized, low-rank or dense (compress); adapter or dense (repair)."
REPORT = _shared("report", Path | None, None, OUTPUT, "Also write an HTML page with tables and plots to this file.")
OVERWRITE = _shared("overwrite", bool, False, OUTPUT, "Replace what the command writes, if it exists.", "--overwrite")
RESTART = _shared(
    "restart",
    bool,
    False,
    OUTPUT,
    "Discard an unfinished run that was to write OUT, instead of resuming it.",
    "--restart",
)
DRY_RUN = _shared(
    "dry_run",
    bool,
    False,
    OUTPUT,
    "Print what the run would take (bytes, disk, memory, time), and write nothing.",
    "--dry-run",
)
AS_JSON = _shared("as_json", bool, False, OUTPUT, "Print JSON on standard output, and nothing else.", "--json")

DEVICE = _shared("device", str, "auto", MACHINE, "The device: auto, cpu or cuda.")
MEMORY = _shared(
    "memory",
    str | None,
    None,
    MACHINE,
    "Upper bound of the memory to use, such as 8GiB.",
    shown="most of what is free",
)

CALIBRATE = (DATA, samples(128), LENGTH, BOS, SEED, BATCH_SIZE, DEVICE)
WRITE = (OVERWRITE, RESTART, DRY_RUN, AS_JSON)


def output_format(default: str) -> Parameter:
    """Return --format with a default."""
    return _shared("format", str, default, OUTPUT, FORMAT)
