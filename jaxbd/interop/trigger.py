"""Trigger files: a picture or an .npz becomes pixels for `attacks.given`; nothing in them is executed."""

import pathlib
import re
import zipfile
import zlib

import numpy as np

from jaxbd.attacks.given import Loaded
from jaxbd.base import Array, UserError

MOST_BYTES = 64 << 20
"""Largest trigger file, and most bytes it may unpack to."""
SQUARE = re.compile(r"(white|black):(\d{1,4})x(\d{1,4})")
"""A trigger without a file, such as `white:4x4`."""


def load(source: str) -> Loaded:
    """Reads a picture (transparency is the mask), an .npz as `save` writes it, or `white:HxW` / `black:HxW`.

    Raises: UserError when there is no such file or it holds no trigger.
    """
    if square := SQUARE.fullmatch(source):
        height, width = int(square[2]), int(square[3])
        if height * width == 0:
            raise UserError(f"trigger {source}: give sides of at least 1 pixel")
        value = 1.0 if square[1] == "white" else 0.0
        return Loaded(np.full((height, width, 1), value, np.float32), np.ones((height, width, 1), np.float32))
    path = pathlib.Path(source).expanduser()
    if not path.is_file():
        raise UserError(f"trigger {source} does not exist; give a picture, an .npz file, or e.g. white:4x4")
    try:
        if path.stat().st_size > MOST_BYTES:
            raise UserError(f"trigger {source} is larger than {MOST_BYTES >> 20} MiB; give the trigger alone")
        return _from_npz(path) if path.suffix.lower() == ".npz" else _from_picture(path)
    except OSError as error:
        raise UserError(f"trigger {source} cannot be read ({error.strerror or error}); give a PNG or .npz") from None


def save(path: pathlib.Path, pattern: Array, place: tuple[int, int] | None, target: int | None, apply: str) -> None:
    """Writes a trigger as .npz: `pattern` [h, w, C], `place` [2] (absent when random), `target`, `application`."""
    optional = {"place": place, "target": target}
    arrays = {name: np.asarray(value, np.int32) for name, value in optional.items() if value is not None}
    random = {} if place is not None else {"random_place": np.asarray(True)}
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            np.savez(file, pattern=np.asarray(pattern, np.float32), application=np.asarray(apply), **arrays, **random)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}; choose a writable folder with space") from None


def _from_picture(path: pathlib.Path) -> Loaded:
    """8-bit pictures of any mode Pillow reads as grey or colour."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            if picture.width * picture.height * 4 > MOST_BYTES:
                raise UserError(f"trigger {path} has {picture.width}x{picture.height} pixels; give the trigger alone")
            grey = picture.mode in ("1", "L", "LA")
            pixels = np.asarray(picture.convert("LA" if grey else "RGBA"), np.float32) / 255
    except (UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError):
        raise UserError(f"trigger {path} is not a readable picture; give a PNG or .npz") from None
    return Loaded(pixels[..., :-1], pixels[..., -1:])


def _from_npz(path: pathlib.Path) -> Loaded:
    """`pattern`, and where present `mask`, `place` or `random_place`, `target`, `application`; see `save`."""
    names = ("pattern", "mask", "place", "random_place", "target", "application")
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > MOST_BYTES:
            raise UserError(f"trigger {path} unpacks to more than {MOST_BYTES >> 20} MiB; give the trigger alone")
        with np.load(path, allow_pickle=False) as archive:
            found = {name: archive[name] for name in names if name in archive.files}
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, NotImplementedError, RuntimeError, MemoryError):
        raise UserError(f"trigger {path} is not a plain .npz file; save it with np.savez(pattern=…)") from None
    if "pattern" not in found:
        raise UserError(f"trigger {path} has no array 'pattern'; save it with np.savez(pattern=…)")
    pattern = _image(found["pattern"], path, "pattern", (1, 3), least=-1.0)
    mask = _image(found["mask"], path, "mask", (1,)) if "mask" in found else np.ones((*pattern.shape[:2], 1), "f")
    if mask.shape[:2] != pattern.shape[:2]:
        raise UserError(f"trigger {path}: mask {mask.shape[:2]} and pattern {pattern.shape[:2]} differ in size")
    place = _integers(found, "place", 2, path) or ("random" if "random_place" in found else None)
    target = _integers(found, "target", 1, path)
    apply = str(found["application"]) if "application" in found else None
    if apply not in (None, "overwrite", "add"):
        raise UserError(f"trigger {path}: application is {apply[:40]!r}; use overwrite or add")
    return Loaded(pattern, mask, place, target[0] if target else None, apply)


def _image(value: np.ndarray, path, name: str, channels: tuple[int, ...], least: float = 0.0) -> np.ndarray:
    """uint8, or floats in [least, 1], [h, w] or [h, w, C] -> float32 [h, w, C]."""
    value = value[..., None] if value.ndim == 2 else value
    if value.ndim != 3 or value.shape[2] not in channels or 0 in value.shape or value.dtype.kind not in "uf":
        raise UserError(f"trigger {path}: {name} is {value.dtype} {list(value.shape)}; give [h, w, {channels[-1]}]")
    value = np.asarray(value, np.float32) / (255 if value.dtype == np.uint8 else 1)
    if not np.isfinite(value).all() or value.min() < least or value.max() > 1:
        raise UserError(f"trigger {path}: {name} leaves [{least:g}, 1] or is not finite; undo its normalisation")
    return value


def _integers(found: dict[str, np.ndarray], name: str, count: int, path) -> tuple[int, ...] | None:
    """The `count` integers of an optional array."""
    if name not in found:
        return None
    value = found[name].reshape(-1)
    if value.dtype.kind not in "iu" or value.size != count:
        raise UserError(f"trigger {path}: {name} must be {count} integer(s)")
    return tuple(int(number) for number in value)
