"""Folder names and text labels as words: which are numbers, which are missing, which are the same
name."""

import re
import unicodedata
from collections.abc import Iterable, Sequence

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
"""Numbers as people, spreadsheets, NumPy and pandas write them."""
MISSING = ("", "nan", "none", "null", "na", "<na>")
"""What programs write for a missing number, in lower case."""


def are_numbers(words: Iterable[str]) -> bool:
    """Whether every word is a number in some spelling: 3, 03, 3.0, -1, 3e+00."""
    return all(map(NUMBER.fullmatch, words))


def are_decimal(words: Iterable[str]) -> bool:
    """Whether every word consists of digits only."""
    return all(word.isascii() and word.isdecimal() for word in words)


def value(number: str) -> float:
    """The value of a match of `NUMBER`; exact for digits only."""
    return int(number) if are_decimal([number]) else float(number)


def missing(words: Sequence[str]) -> str | None:
    """The first of the different `words` that stands for a missing label; None if none does.

    An empty word always does, one like "nan" only if all other words are numbers.
    """
    empty = [word for word in words if not word.strip()]
    others = [word for word in words if not NUMBER.fullmatch(word)]
    if not empty and 0 < len(others) < len(words):
        empty = others if all(word.strip().lower() in MISSING for word in others) else []
    return empty[0] if empty else None


def compose(name: str) -> str:
    """`name` in the form in which equal names are equal: macOS stores the accents of file names as
    separate characters."""
    return unicodedata.normalize("NFC", name)
