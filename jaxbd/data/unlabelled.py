"""Images without labels, as at test time: a picture, a folder of pictures, or a .npz with only
`images`."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxbd.base import UserError
from jaxbd.data import folder, labels, lists, npz, pack, pictures
from jaxbd.limits import clean_text


class Pictures(NamedTuple):
    """Images without labels.

    Attributes:
      images: uint8 [N, H, W, C].
      files: N file names; None for a .npz.
      name: the source.
      total: number of images in the source; N of them were drawn.
      notes: what the user should know about how the source was read.
    """

    images: np.ndarray
    files: tuple[str, ...] | None
    name: str
    total: int
    notes: tuple[str, ...] = ()


def is_unlabelled(spec: str, find_classes: Callable[[], labels.Classes] = labels.Classes) -> bool:
    """Whether `spec` names images without labels.

    False for a source that cannot be read: the readers of labelled data then report why.

    Args:
      find_classes: returns what is known of the model's classes; called only for sub-folders beside
        pictures. Those that cannot be these classes do not label anything.
    """
    path = Path(os.path.expanduser(spec))
    if path.is_dir():
        if not any(map(folder.is_picture, path.iterdir())):
            return False
        return not _has_classes(path, find_classes) and lists.find(path, "test") is None
    return path.is_file() and (
        folder.is_picture(path) or (path.suffix.lower() == ".npz" and not npz.has_labels(path))
    )


def _has_classes(path: Path, find_classes: Callable[[], labels.Classes]) -> bool:
    names = [entry.name for entry in folder.sub_folders(path)]
    if not names:
        return False
    classes = find_classes()
    try:
        return bool(labels.number_folders(names, classes, str(path)))
    except UserError:
        return False


def load(
    spec: str, image_shape: pictures.Shape, *, limit: int | None = None, seed: int = 0
) -> Pictures:
    """Reads a source for which `is_unlabelled` holds. Pictures are resized to `image_shape`; arrays
    must have it.

    Args:
      limit: maximum number of images, drawn without replacement with `seed`, in the source's order.
    Raises: UserError when an image is unreadable or has another shape.
    """
    path = Path(os.path.expanduser(spec))
    if path.is_dir() or folder.is_picture(path):
        files = sorted(filter(folder.is_picture, path.iterdir())) if path.is_dir() else [path]
        total = len(files)
        files = [files[row] for row in pack.chosen_rows(total, limit, seed)]
        images = folder.decode_files(files, path if path.is_dir() else path.parent, image_shape)
        names = tuple(file.name for file in files)
        return Pictures(images, names, str(path), total, _describe_folders(path))
    images, total = npz.load_images(path, limit, seed)
    if images.shape[1:] != tuple(image_shape):
        raise UserError(
            f"data {path} has images {list(images.shape[1:])}, the model takes {list(image_shape)}"
        )
    return Pictures(images, None, str(path), total)


def _describe_folders(path: Path) -> tuple[str, ...]:
    """A note on the sub-folders, which are not read; empty if there are none."""
    names = [entry.name for entry in folder.sub_folders(path)] if path.is_dir() else []
    if not names:
        return ()
    listed = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
    return (clean_text(f"the pictures in sub-folders are left out ({listed})"),)
