"""Patterns of layer names: shell patterns, and the regular expressions and the class name that other programs use."""

from fnmatch import fnmatchcase
from functools import lru_cache

import regex

from hesse.errors import OptionError, reason

EXPRESSION = "re:"  # marks a regular expression
EVERY_LINEAR = "Linear"  # the class that recipes of other programs name
LONGEST_MATCH = 1.0  # seconds for one name: a recipe may come from anybody


def matches(layer: str, pattern: str) -> bool:
    """True if a layer's name, or its end after a dot, matches a shell pattern.

    A pattern `re:...` is a regular expression that matches the beginning of the whole name, as in compressed-tensors;
    `Linear` matches every layer.

    Raises:
        OptionError: the regular expression is invalid, or takes too long.
    """
    if pattern.startswith(EXPRESSION):
        try:
            return _expression(pattern).match(layer, timeout=LONGEST_MATCH) is not None
        except TimeoutError:
            raise OptionError(
                f"the pattern {pattern[:80]!r} takes more than {LONGEST_MATCH:g} seconds for one name: simplify it"
            ) from None
    if pattern == EVERY_LINEAR:
        return True
    return fnmatchcase(layer, pattern) or fnmatchcase(layer, f"*.{pattern}")


@lru_cache(maxsize=256)
def _expression(pattern: str) -> "regex.Pattern[str]":
    try:
        return regex.compile(pattern.removeprefix(EXPRESSION))
    except (regex.error, RecursionError, OverflowError, MemoryError) as error:
        raise OptionError(
            f"the pattern {pattern[:80]!r} is not a valid regular expression ({reason(error)}): correct it"
        ) from None
