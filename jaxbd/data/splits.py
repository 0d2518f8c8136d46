"""Recognises the train, test and validation parts of a data set by their usual names."""

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
"""{split: words for it}."""
ASIDE = ("meta",)
"""Folders beside the splits without images to classify."""

T = TypeVar("T")


def name(word: str) -> str | None:
    """The split that `word` stands for, ignoring case; None if it stands for none."""
    return next((split for split, words in WORDS.items() if word.lower() in words), None)


def name_in(text: str) -> str | None:
    """The first split named in `text`, such as a file name; None if none is."""
    return next(filter(None, map(name, re.split(r"[-_.\s]+", text))), None)


def choose(parts: Mapping[str, T], split: str, where: str) -> tuple[T, tuple[str, ...]]:
    """Chooses the part for `split`, which may be any of the words for it.

    Without a test part the validation part is used: as in ImageNet, it is the labelled one to test
    on.

    Returns: (part, notes for the user).
    Raises: UserError when there is no such part.
    """
    wanted = name(split) or split
    if wanted in parts:
        return parts[wanted], ()
    if wanted == "test" and "val" in parts:
        return parts["val"], ("there is no test part, the val part is used",)
    raise UserError(f"{where} has no split {split!r}; it has {', '.join(sorted(parts))}")


def folders(path: Path) -> dict[str, Path]:
    """{split: its folder} if every folder in `path` (but `ASIDE`) is named like a split; else {}.

    If none of them has sub-folders, they are classes that happen to be named like splits.
    """
    inside = [entry for entry in folder.sub_folders(path) if entry.name.lower() not in ASIDE]
    parts = {part: entry for entry in inside if (part := name(entry.name))}
    if len(parts) < len(inside):
        return {}
    if not any(folder.sub_folders(entry) for entry in inside):
        return {}
    return parts


def group(files: Iterable[Path]) -> dict[str, list[Path]]:
    """Groups files by the split that starts their name or names their folder; drops the others."""
    groups: dict[str, list[Path]] = {}
    for file in files:
        first = re.split(r"[-_.]", file.name)[0]
        if part := name(first) or name(file.parent.name):
            groups.setdefault(part, []).append(file)
    return groups
