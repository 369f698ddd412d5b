"""Shared parts of HTML pages: single files with plots and styles inside, readable offline."""

from importlib.util import find_spec
from pathlib import Path

from hesse.checkpoints.files import unfinished_file
from hesse.errors import OptionError, OutputError, reason
from hesse.reporting.terminal import number, size
from hesse.version import __version__


def check_page(path: Path, overwrite: bool, option: str, made: Path | None = None) -> None:
    """Check, before anything is computed, that a page can be drawn and may be written.

    `option` is the option that requested the page; the folder `made` will exist by the time the page is written.

    Raises:
        OptionError: matplotlib or jinja2 is not installed.
        OutputError: the file exists, its folder does not, or `made` is the file itself or lies below it.
    """
    if any(find_spec(name) is None for name in ("jinja2", "matplotlib")):
        raise OptionError(f"a page needs matplotlib and jinja2: pip install 'hesse[report]', or leave out {option}")
    if path.exists() and not (overwrite and path.is_file()):
        raise OutputError(f"{path} exists: give another name, or --overwrite to replace a file")
    if made is not None and made.resolve().is_relative_to(path.resolve()):
        raise OutputError(f"{path} will be a folder, since OUT is {made}: give {option} another name")
    folder = path.absolute().parent
    if not folder.is_dir() and (made is None or folder != made.absolute()):
        raise OutputError(f"the folder of {path} does not exist: make it first")


def write_page(path: Path, page: str) -> None:
    """Write `page` to `path`, which appears only when it is complete.

    Raises:
        OutputError: the disk is full or cannot be written.
    """
    try:
        with unfinished_file(path) as unfinished:
            # Invalid characters, such as half a character from a model, become question marks.
            unfinished.write_text(page, encoding="utf-8", errors="replace")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {reason(error)}") from None


def render(template: str, **values: object) -> str:
    """Render a file of `templates/` with `values`; all text in them is escaped."""
    import jinja2  # imported late: optional

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hesse.reporting"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, size=size)
    return environment.get_template(template).render(**values, version=__version__)
