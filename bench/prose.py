"""Paragraphs of the pages that benchmarks write."""

import textwrap


def paragraph(text: str) -> str:
    """Return the text, wrapped at 120 columns."""
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)
