"""Sizes as people write them."""

import re

UNITS = {"": 1.0, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def read_size(text: str, percent: float | None = None) -> float | None:
    """The bytes that a text such as 8GiB, 1.5 GB or 7 means, or 40% where `percent` is one; None if it means none."""
    units = UNITS if percent is None else {**UNITS, "%": percent}
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *(%|[A-Za-z]*)", text.strip())
    if found is None or found[2].upper() not in units:
        return None
    return float(found[1]) * units[found[2].upper()]
