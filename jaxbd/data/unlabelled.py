"""Images without labels, as at test time: a picture, a folder of pictures, or a .npz with only
`images`."""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxbd.base import UserError
from jaxbd.data import folder, lists, npz, pack, pictures


class Pictures(NamedTuple):
    """images: uint8 [N, H, W, C]; files: N file names, None for a .npz; name: the source."""

    images: np.ndarray
    files: tuple[str, ...] | None
    name: str


def is_unlabelled(spec: str) -> bool:
    """Whether `spec` names images without labels.

    False for a source that cannot be read: the readers of labelled data then report why.
    """
    path = Path(os.path.expanduser(spec))
    if path.is_dir():
        has_pictures = any(map(folder.is_picture, path.iterdir()))
        return has_pictures and not folder.sub_folders(path) and lists.find(path, "test") is None
    return path.is_file() and (
        folder.is_picture(path) or (path.suffix.lower() == ".npz" and not npz.has_labels(path))
    )


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
        files = [files[row] for row in pack.chosen_rows(len(files), limit, seed)]
        images = folder.decode_files(files, path if path.is_dir() else path.parent, image_shape)
        return Pictures(images, tuple(file.name for file in files), str(path))
    images = npz.load_images(path, limit, seed)
    if images.shape[1:] != tuple(image_shape):
        raise UserError(
            f"data {path} has images {list(images.shape[1:])}, the model takes {list(image_shape)}"
        )
    return Pictures(images, None, str(path))
