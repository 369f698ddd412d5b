"""Parse sizes such as 8GiB."""

import re

UNITS = {"": 1.0, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def read_size(text: str, percent: float | None = None) -> float | None:
    """Return the bytes of a text such as 8GiB, 1.5 GB or 7, or 40% if `percent` gives one percent; None if invalid."""
    units = UNITS if percent is None else {**UNITS, "%": percent}
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *(%|[A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in units:
        return None
    return float(match[1]) * units[match[2].upper()]
