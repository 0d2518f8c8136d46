"""A folder with one sub-folder of image files per class."""

import collections
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from jaxbd.base import Dataset, UserError
from jaxbd.data import bounded, labels, pack, pictures

LEFTOVERS = ("__MACOSX", "__pycache__", "@eaDir", "lost+found", "$RECYCLE.BIN")
"""Folders left behind by archivers and file servers; never classes."""
MAX_DEPTH = 8
"""Maximum nesting of folders below a class folder."""

MAX_SKIPPED = 20_000
"""Maximum number of files below the class folders that are not images."""

Skipped = collections.Counter[str]
"""Number of files that were not read, by suffix."""


def load(
    path: str | Path,
    *,
    image_shape: pictures.Shape | None = None,
    limit: int | None = None,
    seed: int = 0,
    classes: labels.Classes = labels.Classes(),
) -> Dataset:
    """Reads every image file of every class, at any depth below the class's sub-folder.

    `labels.number_folders` numbers the sub-folders; an empty one still gets a number. Hidden files
    and leftovers of other programs are skipped. Other files that are not images are skipped and
    counted in the data set's notes.

    Args:
      image_shape: see `pictures.decode`.
      limit: maximum number of images, drawn with `seed` before anything is decoded.
    Raises: UserError when there are no classes or images, when the order of the classes is
      ambiguous or their number differs from the model's, or on a bad image.
    """
    path = below_wrappers(Path(path))
    folders = class_folders(path)
    numbers, names, notes = labels.number_folders(
        [folder.name for folder in folders], classes, f"data {path}"
    )
    skipped: Skipped = collections.Counter()
    files = [
        (file, label)
        for folder, label in zip(folders, numbers, strict=True)
        for file in image_files(folder, skipped)
    ]
    outside = sum(is_picture(entry) for entry in path.iterdir())
    if outside:
        notes += (f"skipped {outside} images outside the class folders",)
    if not files:
        raise UserError(
            f"data {path}: no class sub-folder holds images ({', '.join(pictures.SUFFIXES)}); add"
            " some"
        )
    chosen = [files[row] for row in pack.chosen_rows(len(files), limit, seed)]
    seen: pictures.Seen = []
    images = decode_files([file for file, _ in chosen], path, image_shape, seen)
    given = [label for _, label in chosen]
    notes += (*count_skipped(skipped), *pictures.describe_changes(seen, images.shape[1:]))
    return pack.dataset(images, given, names, str(path), classes, notes)


def decode_files(
    files: list[Path],
    root: Path,
    image_shape: pictures.Shape | None,
    seen: pictures.Seen | None = None,
) -> np.ndarray:
    """Decodes `files` to uint8 [N, H, W, C]; messages give their paths relative to `root`.

    Args:
      seen: see `pictures.decode`.
    """
    named = ((_name_from(root, file), bounded.read_file(file)) for file in files)
    return pictures.decode(named, len(files), image_shape=image_shape, seen=seen)


def _name_from(root: Path, file: Path) -> str:
    return str(file.relative_to(root)) if file.is_relative_to(root) else str(file)


def sub_folders(path: Path) -> list[Path]:
    """The visible sub-folders of `path`, sorted by name as text; without what jaxbd wrote there."""
    if not path.is_dir():
        raise UserError(
            f"data {path} is not a folder; give a folder with one sub-folder of images per class"
        )
    found = (entry for entry in path.iterdir() if is_visible(entry.name) and entry.is_dir())
    return sorted((entry for entry in found if not is_output(entry)), key=lambda entry: entry.name)


def is_output(path: Path) -> bool:
    """Whether the folder is a case, a model folder, or the checkpoints of an unfinished run."""
    if (path / "scan.json").is_file():
        return (path / "triggers").is_dir()
    is_run = path.suffix == ".run" or (path / "model.safetensors").is_file()
    return is_run and (path / "config.json").is_file()


def is_visible(name: str) -> bool:
    """Whether a file or folder of this name is neither hidden nor another program's leftover."""
    return name[0] != "." and name not in LEFTOVERS


def below_wrappers(path: Path) -> Path:
    """Descends through wrapper folders (GTSRB's `Final_Training/Images`) to the class folders.

    `path` is a wrapper if it holds a single folder and no image, and that folder holds at least two
    folders and no image.
    """
    while len(inner := sub_folders(path)) == 1 and not any(map(is_picture, path.iterdir())):
        if len(sub_folders(inner[0])) < 2 or any(map(is_picture, inner[0].iterdir())):
            break
        path = inner[0]
    return path


def class_folders(path: Path) -> list[Path]:
    """The class sub-folders of `path`, sorted by name as text. Raises: UserError if none."""
    folders = sub_folders(path)
    if not folders:
        lists = sorted(entry.name for entry in path.iterdir() if entry.suffix.lower() == ".csv")
        hint = f" ({lists[0]} names no image here)" if lists else ""
        raise UserError(
            f"data {path} has no class sub-folders; put the images of each class into one of its"
            f" own, or list them in a .csv file with the columns filename and label{hint}"
        )
    return folders


def image_files(folder: Path, skipped: Skipped) -> list[Path]:
    """The image files in `folder` and below, sorted by path as text.

    Counts other files in `skipped`. Raises: UserError for a folder with files but no image.
    """
    images: list[Path] = []
    before = skipped.total()
    for entry in walk(folder):
        if is_picture(entry):
            images.append(entry)
        elif entry.name not in ("Thumbs.db", "desktop.ini"):  # Windows writes these anywhere
            skipped[_kind(entry)] += 1
            if skipped.total() > MAX_SKIPPED:
                raise UserError(
                    f"the class folders up to {folder} hold more than {MAX_SKIPPED:,} files that"
                    " are not images; give a folder of images"
                )
    if skipped.total() > before and not images:
        raise UserError(
            f"class folder {folder} holds files but no images ({', '.join(pictures.SUFFIXES)});"
            " convert them"
        )
    return sorted(images, key=str)


def is_picture(entry: Path) -> bool:
    """Whether `entry` is a visible regular file with the suffix of a picture format."""
    return (
        entry.suffix.lower() in pictures.SUFFIXES
        and is_visible(entry.name)
        and bounded.is_regular(entry)
    )


def _kind(entry: Path) -> str:
    if not bounded.is_regular(entry):
        return "pipes, devices or dead links"
    return entry.suffix.lower()[:12] or "without suffix"


def walk(folder: Path) -> Iterable[Path]:
    """Yields every visible file in `folder` and below; follows links to a folder once.

    Raises: UserError for folders nested deeper than `MAX_DEPTH`, and for a link to a folder that
      contains `folder`.
    """
    # folders are compared by device and inode: their paths differ when links lead to them
    above = {(at.st_dev, at.st_ino) for at in map(os.stat, folder.resolve().parents)}
    seen: set[tuple[int, int]] = set()
    for place, inside, files in os.walk(folder, followlinks=True):
        here = os.stat(place)
        inside[:] = sorted(filter(is_visible, inside))  # in place: os.walk descends into these
        if (here.st_dev, here.st_ino) in seen:
            inside.clear()
            continue
        if (here.st_dev, here.st_ino) in above:
            raise UserError(
                f"data {folder}: a link in it leads to {os.path.realpath(place)}, which"
                " contains it; remove the link"
            )
        seen.add((here.st_dev, here.st_ino))
        if len(Path(place).relative_to(folder).parts) > MAX_DEPTH:
            raise UserError(
                f"data {folder}: folders are nested over {MAX_DEPTH} deep; flatten them"
            )
        yield from (Path(place, name) for name in files if is_visible(name))


def count_skipped(skipped: Skipped) -> tuple[str, ...]:
    """A note on the files that were not read; empty if all were."""
    if not skipped:
        return ()
    kinds = ", ".join(f"{kind}: {count}" for kind, count in skipped.most_common(4))
    return (f"skipped {skipped.total()} files that are not read as images ({kinds})",)
