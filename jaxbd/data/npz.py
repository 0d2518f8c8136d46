"""NumPy archives: `images` and `labels`, optionally `class_names`. Pickled contents are refused, never loaded."""

from pathlib import Path

import numpy as np

from jaxbd.base import Dataset, UserError
from jaxbd.data import pack


def load(path: str | Path) -> Dataset:
    """Reads `images` (uint8, or float in [0, 1]; [N, H, W, C], [N, H, W] or clearly [N, C, H, W]) and `labels` [N].

    Floats are rounded to the nearest of 0..255. C is 1 or 3.

    Raises: UserError when the file is missing, damaged or pickled, lacks an array, or holds values of another kind.
    """
    arrays = _arrays(Path(path))
    for wanted in ("images", "labels"):
        if wanted not in arrays:
            has = ", ".join(sorted(arrays)) or "nothing"
            fix = "save with np.savez(images=…, labels=…)"
            raise UserError(f"data {path} has no array {wanted!r}, it has {has}; {fix}")
    names = arrays.get("class_names")
    if names is not None and (names.ndim != 1 or names.dtype.kind != "U"):
        raise UserError(f"data {path}: class_names is {names.dtype} {list(names.shape)}; give a flat array of strings")
    images = _channels_last(_as_uint8(arrays["images"], path), path)
    return pack.dataset(images, arrays["labels"], names, str(path))


def has_labels(path: str | Path) -> bool:
    """Whether the archive has an array `labels`; also True where it cannot be read, so that `load` says why."""
    try:
        return "labels" in _arrays(Path(path))
    except UserError:
        return True


def load_images(path: str | Path) -> np.ndarray:
    """The array `images` alone, uint8 [N, H, W, C]. Raises: UserError as `load` does."""
    arrays = _arrays(Path(path))
    if "images" not in arrays or not len(arrays["images"]):
        raise UserError(f"data {path} has no images; save with np.savez(images=…)")
    return _channels_last(_as_uint8(arrays["images"], path), path)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays jaxbd knows of, by name; the names of others with empty values."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            known = ("images", "labels", "class_names")
            return {name: archive[name] if name in known else np.empty(0) for name in archive.files}
    except FileNotFoundError:
        raise UserError(f"data {path} does not exist; check the path") from None
    except MemoryError:
        raise UserError(f"data {path} claims arrays that do not fit into memory; give fewer images") from None
    except Exception as error:  # damaged archives, encrypted ones and bare arrays each fail in a way of their own
        if "Object arrays" in str(error):
            fix = "save plain arrays (uint8 images, integer labels) instead"
            raise UserError(f"data {path} holds pickled objects, which are never loaded; {fix}") from None
        fix = "pickles are never loaded, write it with np.savez"
        raise UserError(f"data {path} is no intact .npz file; {fix}") from None


def _as_uint8(images: np.ndarray, path: str | Path) -> np.ndarray:
    """uint8 as it is, floats in [0, 1] times 255 and rounded."""
    if images.dtype == np.uint8:
        return images
    if images.dtype.kind != "f":
        raise UserError(f"data {path}: images are {images.dtype}; give uint8 in 0..255 or floats in [0, 1]")
    if images.size and not (np.isfinite(images).all() and images.min() >= 0 and images.max() <= 1):
        raise UserError(f"data {path}: float images leave [0, 1] or are not finite; divide by 255, undo normalisation")
    return np.round(images.astype(np.float32) * 255).astype(np.uint8)


def _channels_last(images: np.ndarray, path: str | Path) -> np.ndarray:
    """[N, H, W] and unmistakable [N, C, H, W] become [N, H, W, C]."""
    if images.ndim == 3:
        return images[..., None]
    last, second = (images.ndim == 4 and images.shape[axis] in (1, 3) for axis in (3, 1))
    if last and not second:
        return images
    if second and not last:
        return np.ascontiguousarray(images.transpose(0, 2, 3, 1))
    fix = "give [N, H, W, C] with 1 or 3 channels"
    why = "could have its channels first or last" if last else "is no batch of images"
    raise UserError(f"data {path}: images of shape {list(images.shape)} {why}; {fix}, transpose(0, 2, 3, 1) helps")
