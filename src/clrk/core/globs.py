"""Globs with `*`, which stands for any text, `/` too. Pure."""

from __future__ import annotations


def fits_glob(glob: str, text: str) -> bool:
    """Match the whole text in one pass, leftmost first: no backtracking, whatever the text."""
    if "*" not in glob:
        return glob == text
    first, *middle, last = glob.split("*")
    if len(text) < len(first) + len(last) or not text.startswith(first) or not text.endswith(last):
        return False
    at, end = len(first), len(text) - len(last)
    for part in middle:
        found = text.find(part, at, end)
        if found < 0:
            return False
        at = found + len(part)
    return True
