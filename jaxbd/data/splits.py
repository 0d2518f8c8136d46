"""Which part of a data set is meant by "train" or "test", by the names that people give them."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from jaxbd.base import UserError
from jaxbd.data import folder

WORDS = {
    "train": ("train", "training", "final_training", "trainset"),
    "test": ("test", "testing", "final_test", "testset", "t10k"),
    "val": ("val", "valid", "validation", "dev"),
}
"""Split -> words for it."""
ASIDE = ("meta",)
"""Folders beside the splits that hold no images to classify."""

T = TypeVar("T")


def name(word: str) -> str | None:
    """The split that `word` stands for in any case, None where it stands for none."""
    return next((split for split, words in WORDS.items() if word.lower() in words), None)


def name_in(text: str) -> str | None:
    """The split named first among the words of a file's name, None where none is."""
    return next(filter(None, map(name, re.split(r"[-_.\s]+", text))), None)


def choose(parts: Mapping[str, T], split: str, where: str) -> tuple[T, tuple[str, ...]]:
    """The part for `split`, which may be named by any of its words.

    Where a set has no test part, its validation part is the labelled one to test on, as in
    ImageNet.

    Returns: (part, notes for the person).
    Raises: UserError when there is no such part.
    """
    wanted = name(split) or split
    if wanted in parts:
        return parts[wanted], ()
    if wanted == "test" and "val" in parts:
        return parts["val"], ("there is no test part, the val part is used",)
    raise UserError(f"{where} has no split {split!r}; it has {', '.join(sorted(parts))}")


def folders(path: Path) -> dict[str, Path]:
    """{split: its folder} where `path` holds a folder of each split and no others; else {}.

    Folders that hold no folders are no splits but classes that are named like them.
    """
    inside = [entry for entry in folder.sub_folders(path) if entry.name.lower() not in ASIDE]
    parts = {part: entry for entry in inside if (part := name(entry.name))}
    if len(parts) < len(inside):
        return {}
    if not any(folder.sub_folders(entry) for entry in inside):
        return {}
    return parts


def group(files: Iterable[Path]) -> dict[str, list[Path]]:
    """Files by the split that their name begins with, or that their folder is named after; others
    are left out."""
    groups: dict[str, list[Path]] = {}
    for file in files:
        first = re.split(r"[-_.]", file.name)[0]
        if part := name(first) or name(file.parent.name):
            groups.setdefault(part, []).append(file)
    return groups
