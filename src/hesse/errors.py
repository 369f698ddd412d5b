"""Every error that Hesse raises on purpose: one line that names the thing and says what to do."""

from collections.abc import Iterator
from contextlib import contextmanager


class HesseError(Exception):
    """Base of all errors below; the command line prints its message and exits with 1."""


class OptionError(HesseError):
    """An option, or a combination of options, that has no meaning."""


class DataError(HesseError):
    """Calibration or evaluation data that cannot be used."""


class CheckpointError(HesseError):
    """A checkpoint folder that is missing something, or holds something that cannot be read."""


class UnsupportedModelError(HesseError):
    """An architecture that is not a list of blocks of linear layers."""


class OutputError(HesseError):
    """An output folder that must not, or cannot, be written."""


class VerificationError(HesseError):
    """A written checkpoint that differs from what was solved, or is worse than predicted beyond all proportion."""


class UnsupportedProduct(HesseError):
    """A product that a curvature, constraint or solver does not offer."""


class ConditioningError(HesseError):
    """A curvature that cannot be factorised: singular, indefinite or not finite."""


class ConditioningWarning(UserWarning):
    """A result that rounding may have spoilt."""


def check_at_least(option: str, value: int | None, least: int) -> None:
    """Raise OptionError if the option was given as less than `least`."""
    if value is not None and value < least:
        raise OptionError(f"{option} is {value}, but must be at least {least}")


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Raise a HesseError of what is done inside with `what` before its message: a layer's name, for one."""
    try:
        yield
    except HesseError as error:
        raise type(error)(f"{what}: {error}") from None


def printable(text: str) -> str:
    """`text` on one line, with each character that could steer a terminal or hide others spelt out, such as ESC."""
    return "".join(mark if mark.isprintable() else mark.encode("unicode_escape").decode() for mark in text)


def reason(error: BaseException) -> str:
    """What an error of another library says, on one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(":. ")
