"""Output folders: written under a temporary name, and renamed only when everything in them is verified."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hesse.checkpoints.files import belongs, name_beside
from hesse.checkpoints.writer import writing
from hesse.errors import OutputError

# Files that a loader needs in addition to weights and config.
COPIED = ("*.json", "*.model", "*.txt", "*.jinja", "*.py", "LICENSE*", "*/*.json")
NOT_COPIED = ("config.json", "model.safetensors.index.json", "calibration.txt", "held_out.txt", "training.json")


def check_output(out: Path, model: Path, overwrite: bool, mark: str = "config.json") -> None:
    """Check that an output folder may be written; an existing folder may be replaced only if it has the file `mark`.

    Raises:
        OutputError: it exists, it lies inside the model's folder or the other way round, or its parent cannot be
            written.
    """
    target, source = out.absolute().resolve(), model.absolute().resolve()
    if target == source or source in target.parents:
        raise OutputError(f"OUT {out} lies inside the model's folder {model}: give a folder outside it")
    if target in source.parents:
        raise OutputError(f"the model {model} lies inside OUT {out}, which would be replaced: give another OUT")
    if out.is_symlink() or out.exists():
        if not overwrite:
            raise OutputError(f"OUT {out} exists: give another name, or --overwrite to replace it")
        if not out.is_dir() or out.is_symlink():
            raise OutputError(f"OUT {out} is not a folder: remove it, or give another name")
        if any(out.iterdir()) and not (out / mark).is_file():
            raise OutputError(f"OUT {out} has no {mark}, so --overwrite does not replace it: give another name")
    parent = next(p for p in target.parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"{parent} cannot be written: give an OUT elsewhere")


@contextmanager
def temporary_folder(out: Path, needed_bytes: int) -> Iterator[Path]:
    """Yield a temporary folder next to `out`; rename it to `out` at the end, or delete it after an error.

    Raises:
        OutputError: there is not enough room for `needed_bytes`, or the folder cannot be created.
    """
    made = make_parents(out)
    with writing(out, "made"):
        folder = name_beside(out, "partial")
        folder.mkdir()
    try:
        check_room(folder, out, needed_bytes)
        yield folder
        put_in_place(folder, out)
    except BaseException:
        remove_with_parents(folder, made)
        raise


def make_parents(out: Path) -> list[Path]:
    """Create the parent folders of `out`; return the ones that did not exist, the innermost first.

    Raises:
        OutputError: a folder cannot be created.
    """
    made = [p for p in (out.absolute().parent, *out.absolute().parent.parents) if not p.exists()]
    with writing(out, "made"):
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
    return made


def remove_with_parents(folder: Path, made: list[Path]) -> None:
    """Remove a folder, and the parents `made` for it that are empty."""
    shutil.rmtree(folder, ignore_errors=True)
    for parent in made:
        if parent.is_dir() and not any(parent.iterdir()):
            parent.rmdir()


def check_room(folder: Path, out: Path, needed_bytes: int) -> None:
    """Check that there is enough room on the disk.

    Raises:
        OutputError: the disk of `folder`, which is to become `out`, has less than `needed_bytes` free.
    """
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise OutputError(
            f"the disk of {out} is full: about {needed_bytes:,} bytes are needed, but {free:,} are free; "
            "give an OUT on another disk"
        )


def copy_companions(model: Path, folder: Path) -> list[str]:
    """Copy the tokenizer, generation config, model code and similar files unchanged.

    Returns a note for each link out of the model's folder, which is not followed, and a note if there is code.

    Raises:
        OutputError: the disk is full or cannot be written.
    """
    own, notes = _companions(model)
    for path in own:
        target = folder / path.relative_to(model)
        with writing(folder.parent):
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
    return notes


def companion_notes(model: Path) -> list[str]:
    """Return the notes of `copy_companions`, without copying."""
    return _companions(model)[1]


def _companions(model: Path) -> tuple[list[Path], list[str]]:
    """Return the files to copy, and notes on links out of the folder, possibly to any of the user's files, and code."""
    found = dict.fromkeys(path for pattern in COPIED for path in sorted(model.glob(pattern)) if path.is_file())
    wanted = [path for path in found if path.relative_to(model).as_posix() not in NOT_COPIED]
    own = [path for path in wanted if belongs(path, model)]
    notes = [
        f"{path.relative_to(model)} was not copied: it is a link to {path.resolve()}, outside of the model's folder"
        for path in wanted
        if path not in own
    ]
    code = ", ".join(str(path.relative_to(model)) for path in own if path.suffix == ".py")
    if code:
        notes.append(f"{code}: code that came with the model was copied, not run; trust_remote_code=True may run it")
    return own, notes


def put_in_place(folder: Path, out: Path) -> None:
    """Rename `folder` to `out` after all its files are on the disk; an existing `out` is set aside and removed last.

    Raises:
        OutputError: the disk cannot be written.
    """
    with writing(out):
        for path in folder.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        if not out.exists():
            folder.rename(out)
            return
        aside = _aside(out)
        shutil.rmtree(aside, ignore_errors=True)
        out.rename(aside)
        try:
            folder.rename(out)
        except OSError:
            aside.rename(out)
            raise
    shutil.rmtree(aside, ignore_errors=True)


def restore_replaced(out: Path) -> None:
    """Restore an `out` that was set aside to be replaced, if the process was killed at that moment."""
    if _aside(out).is_dir() and not out.exists():
        _aside(out).rename(out)


def _aside(out: Path) -> Path:
    return out.absolute().with_name(f".{out.name}.replaced")
