"""Errors that Hesse raises on purpose: each message is one line that names the cause and the remedy."""

from collections.abc import Iterator
from contextlib import contextmanager


class HesseError(Exception):
    """Base of all errors below; the command line prints its message and exits with 1."""


class OptionError(HesseError):
    """An option, or a combination of options, that is not valid."""


class DataError(HesseError):
    """Calibration or evaluation data that cannot be used."""


class CheckpointError(HesseError):
    """A checkpoint folder that lacks a file, or holds one that cannot be read."""


class UnsupportedModelError(HesseError):
    """An architecture that is not a list of blocks of linear layers."""


class OutputError(HesseError):
    """An output folder that must not, or cannot, be written."""


class VerificationError(HesseError):
    """A written checkpoint that differs from the solution, or whose loss is far above the prediction."""


class UnsupportedProduct(HesseError):
    """A product that a curvature, constraint or solver does not offer."""


class ConditioningError(HesseError):
    """A curvature that cannot be factorised: singular, indefinite or not finite."""


class ConditioningWarning(UserWarning):
    """A result that may be inaccurate because of rounding errors."""


LARGEST = 2**63 - 1  # of the integers that PyTorch takes


def check_at_least(option: str, value: int | None, least: int) -> None:
    """Raise OptionError if the option is given and below `least`, or past 64 bits."""
    if value is not None and value < least:
        raise OptionError(f"{option} is {value}, but must be at least {least}")
    if value is not None and value > LARGEST:
        raise OptionError(f"{option} is {value}, but must be at most {LARGEST}")


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Put `what`, such as a layer's name, before the message of a HesseError that is raised inside."""
    try:
        yield
    except HesseError as error:
        raise type(error)(f"{what}: {error}") from None


def printable(text: str) -> str:
    """Return `text` on one line, with escapes for characters such as ESC that control a terminal or hide others."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


def reason(error: BaseException) -> str:
    """Return the message of another library's error, on one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(":. ")
