"""Mini-ImageNet and VGGFace2 as the DHBE experiments use them: 100 classes, 64 x 64 pixels, a train
and a test split.

Both are distributed for other tasks (few-shot learning, face recognition), with splits of different
classes. For classification the splits are pooled, and each class is divided deterministically.
"""

import collections
import csv
import hashlib
import itertools
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, TypeGuard

from jaxbd.base import Dataset, UserError
from jaxbd.data import bounded, folder, labels, lists, pack, pictures

SPLITS = ("train", "test", "val", "valid", "validation")
TEST_SHARE = 6
"""One image in so many goes to the test split that is made here: 100 of Mini-ImageNet's 600 per
class."""
SHAPE = (64, 64, 3)

Files = Callable[[], list[Path]]
"""Lists the image files of a class; called only when needed, since VGGFace2 has three million."""
Classes = dict[str, Files]


class Recipe(NamedTuple):
    """Maximum number of classes, and the zoom of `pictures.fit` (Yan et al. 2023, section 5.2.3;
    the release).

    The shorter side becomes 64 pixels for Mini-ImageNet and 84 for VGGFace2; the middle 64 x 64 are
    cropped.
    """

    classes: int
    zoom: float


RECIPES = {"mini-imagenet": Recipe(100, 1.0), "vggface2": Recipe(100, 84 / 64)}
"""Keyed by the prefix of the path: `vggface2:PATH`."""


def load(
    kind: str,
    path: str | Path,
    *,
    split: str = "test",
    image_shape: pictures.Shape | None = None,
    limit: int | None = None,
    seed: int = 0,
    classes: labels.Classes = labels.Classes(),
) -> Dataset:
    """Reads `split` of the set `kind`, a key of `RECIPES`, as uint8 [N, 64, 64, 3] or of
    `image_shape`.

    `path` holds class folders; or split folders with class folders; or `images/` with the lists
    train.csv, val.csv and test.csv (columns `filename`, `label`). Splits that share the same
    classes are used as they are. Splits with different classes are pooled; then the sixth of each
    class with the smallest SHA-256 of CLASS/NAME is "test" and the rest "train". Of more than 100
    classes the 100 with the smallest SHA-256 of their name are used (the paper draws 100 identities
    and does not name them). Classes are numbered in the order of their names.

    Args:
      limit: maximum number of images, drawn with `seed` before anything is decoded.
    Raises: UserError when files or the split are missing, when splits share only some classes, or
      on a bad image.
    """
    given, recipe, path = path, RECIPES[kind], Path(os.path.expanduser(path))
    if not str(given) or not path.is_dir():
        raise UserError(
            f"data {kind}:{given} is not a folder; give one of class folders, or images/ and"
            " train.csv"
        )
    parts = _lists(path) or _folders(path)
    members, divided = _together(parts, split, f"{kind}:{path}")
    names = sorted(sorted(members, key=_digest)[: recipe.classes])
    files = [
        (file, k)
        for k, name in enumerate(names)
        for file in _share(members[name](), name, split, divided)
    ]
    if not files:
        raise UserError(
            f"data {kind}:{path} has no {split} images ({', '.join(pictures.SUFFIXES)}); add some"
        )
    chosen = [files[row] for row in pack.chosen_rows(len(files), limit, seed)]
    named = ((str(file), bounded.read_file(file)) for file, _ in chosen)
    shape = (
        image_shape if image_shape and image_shape[0] else (*SHAPE[:2], (image_shape or SHAPE)[2])
    )
    images = pictures.decode(named, len(chosen), image_shape=shape, zoom=recipe.zoom)
    given = [label for _, label in chosen]
    return pack.dataset(images, given, names, f"{kind}:{path}", classes)


def _folders(path: Path) -> dict[str, Classes]:
    """{split: its class folders}; the only split is "" if `path` itself holds the class folders.

    Other folders beside the splits, such as VGGFace2's `meta`, are ignored.
    """
    holds_classes = lambda place: (
        place.is_dir() and any(entry.is_dir() for entry in place.iterdir())
    )
    places = {split: path / split for split in SPLITS if holds_classes(path / split)} or {"": path}
    # the outer lambda binds `place` now, the inner one lists the files later
    listing = lambda place: lambda: folder.image_files(place, collections.Counter())
    return {
        name: {each.name: listing(each) for each in folder.class_folders(at)}
        for name, at in places.items()
    }


def _lists(path: Path) -> dict[str, Classes]:
    """{split: its classes} from the .csv lists in `path`; empty if there are none."""
    found = {split: path / f"{split}.csv" for split in SPLITS if (path / f"{split}.csv").is_file()}
    return {split: _list(file, path / "images") for split, file in found.items()}


def _list(file: Path, images: Path) -> Classes:
    """The classes of one list; its images are in the folder `images` or in its sub-folders named
    after the labels."""
    files: dict[str, list[Path]] = {}
    try:
        lines = lists.Lines(file)
        for row in lines.rows(csv.DictReader(lines)):
            name, label = row.get("filename"), row.get("label")
            if not _plain(name) or not _plain(label):
                raise UserError(
                    f"data {file}: a row is not FILENAME,LABEL with plain names; correct it"
                )
            files.setdefault(label, []).append(images / name)
    except (csv.Error, OSError):
        raise UserError(
            f"data {file} is not a readable .csv list with the columns filename and label"
        ) from None
    if not files:
        raise UserError(
            f"data {file} lists no images; give rows with the columns filename and label"
        )
    below = lambda label, each: each if each.is_file() else images / label / each.name
    listing = lambda label, each: lambda: sorted(below(label, one) for one in each)
    return {label: listing(label, each) for label, each in files.items()}


def _plain(name: str | None) -> TypeGuard[str]:
    """Whether `name` is a plain file name, which cannot lead out of its folder."""
    return bool(name) and name[0] != "." and name == Path(name).name


def _together(parts: dict[str, Classes], split: str, name: str) -> tuple[Classes, bool]:
    """The classes to read `split` from, and whether their files still have to be divided into train
    and test."""
    sets = [set(classes) for classes in parts.values()]
    if len(sets) > 1 and all(one == sets[0] for one in sets):
        if split not in parts:
            raise UserError(
                f"data {name} has no split {split!r}; it has {', '.join(sorted(parts))}"
            )
        return parts[split], False
    shared = {each for one, other in itertools.combinations(sets, 2) for each in one & other}
    if shared:
        raise UserError(
            f"data {name}: the splits share only some classes, such as {min(shared)!r}; give all"
            " splits the same classes"
        )
    if split not in ("train", "test"):
        raise UserError(f"data {name} has no split {split!r}; it is divided into train, test")
    return {each: files for classes in parts.values() for each, files in classes.items()}, True


def _share(files: Iterable[Path], name: str, split: str, divided: bool) -> list[Path]:
    """The files of a class that belong to `split`, sorted; all files unless `divided`."""
    files = sorted(files)
    if not divided:
        return files
    by_digest = sorted(files, key=lambda file: _digest(f"{name}/{file.name}"))
    count = round(len(files) / TEST_SHARE)
    return sorted(by_digest[:count] if split == "test" else by_digest[count:])


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
