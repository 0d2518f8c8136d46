"""NumPy archives (.npz) of images and labels. Pickled contents are refused, never loaded."""

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
"""Array names of (images, labels) in order of preference; case is ignored."""
BARE = ("images", "image", "x", "data")
"""Array names of images in archives without labels."""


def load(
    path: str | Path,
    *,
    split: str = "test",
    limit: int | None = None,
    seed: int = 0,
    classes: labels.Classes = labels.Classes(),
) -> Dataset:
    """Reads images and labels named as in `PAIRS`, and `class_names` if present.

    The split may come first (`test_images`, as in MedMNIST) or last (`x_test`, as in Keras). Images
    are [N, H, W, C], [N, H, W] or unambiguously [N, C, H, W] with C = 1 or 3. Their values are
    uint8, whole numbers of another type in 0..255 that exceed 1, or floats in [0, 1], which are
    rounded to the nearest of 0..255. For labels see `labels.number`.

    Args:
      limit: maximum number of images, drawn with `seed`; no others are held in memory.
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
        # number all labels, not only the drawn rows: a draw may miss a class and shift the numbers
        numbers, every = labels.number(given, names, classes, f"data {path}")
        rows, images = _read_rows(archive, image_name, limit, seed)
    return pack.dataset(images, numbers[rows], every, str(path), classes, notes)


def has_labels(path: str | Path) -> bool:
    """Whether the archive has labels. True if it cannot be read, so that `load` reports why."""
    try:
        with Archive(Path(path)) as archive:
            known = _lower(archive.headers)
            return any(label in known for _, label in PAIRS) or not any(
                name in known for name in BARE
            )
    except UserError:
        return True


def load_images(
    path: str | Path, limit: int | None = None, seed: int = 0
) -> tuple[np.ndarray, int]:
    """Reads only the images.

    Returns: (uint8 [n, H, W, C], the number of images in the file).
    Raises: UserError as `load` does.
    """
    with Archive(Path(path)) as archive:
        known = _lower(archive.headers)
        name = next((known[name] for name in BARE if name in known), None)
        if name is None or not archive.headers[name].shape or not archive.headers[name].shape[0]:
            raise UserError(f"data {path} has no images; save with np.savez(images=…)")
        return _read_rows(archive, name, limit, seed)[1], archive.headers[name].shape[0]


def _lower(names: dict[str, Header]) -> dict[str, str]:
    return {name.lower(): name for name in names}


def _pair(
    headers: dict[str, Header], split: str, path: Path
) -> tuple[tuple[str, str], tuple[str, ...]]:
    """Array names of (images, labels) for `split`, and notes for the user."""
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
    """Draws rows of the images `name`; returns the row numbers [n] and uint8 [n, H, W, C]."""
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
    """Converts the pieces to one uint8 array.

    Floats in [0, 1] are multiplied by 255 and rounded. If values of a type other than uint8 exceed
    1, all must be whole and in 0..255.
    """
    # Pieces are converted as they arrive, so the array never exists as floats. Whether 1 means
    # "white" or "1 of 255" is known only at the end: whole pieces stay as they are until then.
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
            f"data {path}: images are {dtype} with only 0 and 1; give uint8 in 0..255 or floats"
        )
    return np.concatenate([part * np.uint8(255) if whole else part for part, whole in parts])


def _not_pixels(path: Path, dtype: np.dtype) -> UserError:
    return UserError(
        f"data {path}: images are {dtype} and neither floats in [0, 1] nor whole numbers in 0..255,"
        " or not finite; undo normalisation"
    )


def _check_layout(shape: tuple[int, ...], path: Path) -> None:
    """Raises UserError unless the images are [N, H, W], or unambiguously [N, H, W, C] or
    [N, C, H, W]."""
    if len(shape) == 3 and 0 not in shape:
        return
    last, second = (len(shape) == 4 and shape[axis] in (1, 3) for axis in (3, 1))
    if (last or second) and not (last and second) and 0 not in shape:
        return
    ambiguous = "could have its channels first or last"
    why = ambiguous if last and second else "is not a batch of images"
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
