"""NumPy archives of images and labels. Pickled contents are refused, never loaded."""

import contextlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from jaxbd.base import Dataset, UserError
from jaxbd.data import labels, pack, splits
from jaxbd.data.npz_archive import Archive, Header

PAIRS = (
    ("images", "labels"),
    ("image", "label"),
    ("x", "y"),
    ("data", "labels"),
    ("data", "label"),
    ("data", "targets"),
    ("data", "target"),
    ("images", "targets"),
    ("features", "labels"),
    ("samples", "labels"),
    ("arr_0", "arr_1"),
)
"""Names of the images and of the labels, in any case."""
BARE = ("images", "image", "x", "data")
"""Names of images without labels."""


def load(
    path: str | Path,
    *,
    split: str = "test",
    limit: int | None = None,
    seed: int = 0,
    classes: labels.Classes = labels.Classes(),
) -> Dataset:
    """Reads images and labels under one of the names of `PAIRS`, and `class_names` where it is.

    Names may have the split before (`test_images`, as MedMNIST) or behind (`x_test`, as Keras).
    Images are [N, H, W, C], [N, H, W] or clearly [N, C, H, W] with C = 1 or 3: uint8, other
    numbers that are whole and reach beyond 1 (0..255), or floats in [0, 1], which are rounded to
    the nearest of 0..255. Labels: see `labels.number`.

    Args:
      limit: at most so many images, drawn with `seed`; no others are kept in memory.
    Raises: UserError when the file is missing, damaged, pickled or claims too much, lacks an
      array, or holds values of another kind.
    """
    path = Path(path)
    with Archive(path) as archive:
        (image_name, label_name), notes = _pair(archive.headers, split, path)
        names = archive.read("class_names") if "class_names" in archive.headers else None
        if names is not None and (
            names.ndim != 1 or names.dtype.kind != "U" or len(names) > labels.MAX_CLASSES
        ):
            raise UserError(
                f"data {path}: class_names is {names.dtype} {list(names.shape)}; give a flat array"
                " of strings"
            )
        counts = [archive.headers[name].shape[:1] for name in (image_name, label_name)]
        if counts[0] != counts[1]:
            images, given = (count[0] if count else 0 for count in counts)
            raise UserError(
                f"data {path}: {images} images but {given} labels; give one label per image"
            )
        given, names = archive.read(label_name), None if names is None else names.tolist()
        # all labels are numbered, so that a draw without some class leaves the others' numbers
        numbers, every = labels.number(given, names, classes, f"data {path}")
        rows, images = _read_rows(archive, image_name, limit, seed)
    return pack.dataset(images, numbers[rows], every, str(path), classes, notes)


def has_labels(path: str | Path) -> bool:
    """Whether the archive has labels; also True where it cannot be read, so that `load` says
    why."""
    try:
        with Archive(Path(path)) as archive:
            known = _lower(archive.headers)
            return any(label in known for _, label in PAIRS) or not any(
                name in known for name in BARE
            )
    except UserError:
        return True


def load_images(path: str | Path, limit: int | None = None, seed: int = 0) -> np.ndarray:
    """The images alone, uint8 [N, H, W, C]. Raises: UserError as `load` does."""
    with Archive(Path(path)) as archive:
        known = _lower(archive.headers)
        name = next((known[name] for name in BARE if name in known), None)
        if name is None or not archive.headers[name].shape or not archive.headers[name].shape[0]:
            raise UserError(f"data {path} has no images; save with np.savez(images=…)")
        return _read_rows(archive, name, limit, seed)[1]


def _lower(names: dict[str, Header]) -> dict[str, str]:
    return {name.lower(): name for name in names}


def _pair(
    headers: dict[str, Header], split: str, path: Path
) -> tuple[tuple[str, str], tuple[str, ...]]:
    """Names of the images and the labels of `split`, and notes for the person."""
    known = _lower(headers)
    for pair in PAIRS:
        if all(name in known for name in pair):
            return (known[pair[0]], known[pair[1]]), ()
    parts: dict[str, tuple[str, str]] = {}
    for part, words in splits.WORDS.items():
        for image, label in PAIRS:
            for word in words:
                for form in ("{0}_{1}", "{1}_{0}", "{0}{1}", "{1}{0}"):
                    names = form.format(image, word), form.format(label, word)
                    if all(name in known for name in names):
                        parts.setdefault(part, (known[names[0]], known[names[1]]))
    if not parts:
        has = ", ".join(sorted(headers)[:8]) or "nothing"
        wanted = "'images' and 'labels'"
        raise UserError(
            f"data {path} has no array {wanted}, it has {has}; save with np.savez(images=…,"
            " labels=…)"
        )
    return splits.choose(parts, split, f"data {path}")


def _read_rows(
    archive: Archive, name: str, limit: int | None, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Chosen rows [n] of the images `name`, and these as uint8 [n, H, W, C]."""
    header, path = archive.headers[name], archive.path
    if not header.shape:
        raise UserError(f"data {path}: {name} is a single value; give [N, H, W, C]")
    rows = pack.chosen_rows(header.shape[0], limit, seed)
    archive.check(header)
    if header.dtype.kind not in "uif":
        raise UserError(
            f"data {path}: images are {header.dtype}; give uint8 in 0..255 or floats in [0, 1]"
        )
    if len(rows) == 0:
        return rows, np.empty((0, *header.shape[1:]), np.uint8)
    _check_layout(header.shape, path)
    with contextlib.closing(archive.pieces(name, rows)) as pieces:
        return rows, _channels_last(_as_uint8(pieces, header.dtype, path))


def _as_uint8(pieces: Iterable[np.ndarray], dtype: np.dtype, path: Path) -> np.ndarray:
    """All pieces as one array uint8.

    Floats in [0, 1] are multiplied by 255 and rounded. Of other types than uint8, values that
    reach beyond 1 must be whole and in 0..255.
    """
    if dtype == np.uint8:
        return np.concatenate(list(pieces))
    parts, high = [], 0.0
    for piece in pieces:
        piece = piece.astype(np.float32)
        if not np.isfinite(piece).all() or piece.min(initial=0) < 0:
            raise _not_pixels(path, dtype)
        high = max(high, float(piece.max(initial=0)))
        is_whole = bool((piece == np.round(piece)).all())
        if high > 255 or (high > 1 and not is_whole):
            raise _not_pixels(path, dtype)
        parts.append((np.round(piece * (1 if is_whole else 255)).astype(np.uint8), is_whole))
    if high > 1:
        if not all(is_whole for _, is_whole in parts):
            raise _not_pixels(path, dtype)
        return np.concatenate([part for part, _ in parts])
    if dtype.kind != "f":
        raise UserError(
            f"data {path}: images are {dtype} of 0 and 1 alone; give uint8 in 0..255 or floats"
        )
    return np.concatenate([part * np.uint8(255) if whole else part for part, whole in parts])


def _not_pixels(path: Path, dtype: np.dtype) -> UserError:
    return UserError(
        f"data {path}: images are {dtype} and leave [0, 1], or 0..255 in whole numbers, or are not"
        " finite; undo normalisation"
    )


def _check_layout(shape: tuple[int, ...], path: Path) -> None:
    """Raises UserError unless the images are [N, H, W], or [N, H, W, C] or [N, C, H, W] beyond
    doubt."""
    if len(shape) == 3 and 0 not in shape:
        return
    last, second = (len(shape) == 4 and shape[axis] in (1, 3) for axis in (3, 1))
    if (last or second) and not (last and second) and 0 not in shape:
        return
    why = "could have its channels first or last" if last and second else "is no batch of images"
    raise UserError(
        f"data {path}: images of shape {list(shape)} {why}; give [N, H, W, C] with 1 or 3"
        " channels, reshape or transpose(0, 2, 3, 1) helps"
    )


def _channels_last(images: np.ndarray) -> np.ndarray:
    if images.ndim == 3:
        return images[..., None]
    if images.shape[3] in (1, 3):
        return images
    return np.ascontiguousarray(images.transpose(0, 2, 3, 1))
