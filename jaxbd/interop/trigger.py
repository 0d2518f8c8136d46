"""Trigger files: a picture or an .npz becomes pixels or a warp for `attacks.given`; nothing in them is executed."""

import pathlib
import re
import zipfile
import zlib
from typing import Literal

import numpy as np

from jaxbd.attacks.given import Loaded
from jaxbd.base import UserError

MOST_BYTES = 64 << 20
"""Largest trigger file, and most bytes it may unpack to."""
ALL_TO_ALL = "all-to-all"
"""The target of a trigger that leads from every class to the next."""
APPLICATIONS = ("overwrite", "add", "blend", "bits")
"""How a trigger made of pixels is put on images, see `attacks.given.Config`."""
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


def save(path: pathlib.Path, trigger: Loaded) -> None:
    """Writes a trigger as .npz: `pattern` [h, w, C] and `mask` [h, w, 1], or the `grid` [H, W, 2] of a warp.

    And what is known of it: `place` [2] or `random_place`, `target` (a class or "all-to-all"), `application`.
    """
    pixels = {"pattern": trigger.pattern, "mask": trigger.mask, "grid": trigger.grid}
    arrays = {name: np.asarray(value, np.float32) for name, value in pixels.items() if value is not None}
    known = {"place": trigger.place, "target": trigger.target, "application": trigger.apply}
    if trigger.place == "random":
        known = {**known, "place": None, "random_place": True}
    arrays |= {name: np.asarray(value) for name, value in known.items() if value is not None}
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            np.savez(file, **arrays)
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
    """`pattern` or `grid`, and where present `mask`, `place` or `random_place`, `target`, `application`; see `save`."""
    names = ("pattern", "mask", "grid", "place", "random_place", "target", "application")
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > MOST_BYTES:
            raise UserError(f"trigger {path} unpacks to more than {MOST_BYTES >> 20} MiB; give the trigger alone")
        with np.load(path, allow_pickle=False) as archive:
            found = {name: archive[name] for name in names if name in archive.files}
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, NotImplementedError, RuntimeError, MemoryError):
        raise UserError(f"trigger {path} is not a plain .npz file; save it with np.savez(pattern=…)") from None
    if ("pattern" in found) == ("grid" in found):
        raise UserError(
            f"trigger {path}: needs an array 'pattern', or 'grid' for a warp; save it with np.savez(pattern=…)"
        )
    target = _target(found, path)
    if "grid" in found:
        return Loaded(place=(0, 0), target=target, apply="warp", grid=_grid(found["grid"], path))
    pattern = _image(found["pattern"], path, "pattern", (1, 3), least=-1.0)
    mask = _image(found["mask"], path, "mask", (1,)) if "mask" in found else np.ones((*pattern.shape[:2], 1), "f")
    if mask.shape[:2] != pattern.shape[:2]:
        raise UserError(f"trigger {path}: mask {mask.shape[:2]} and pattern {pattern.shape[:2]} differ in size")
    place = _integers(found, "place", 2, path) or ("random" if "random_place" in found else None)
    apply = str(found["application"]) if "application" in found else None
    if apply is not None and apply not in APPLICATIONS:
        raise UserError(f"trigger {path}: application is {apply[:40]!r}; use {', '.join(APPLICATIONS)}")
    return Loaded(pattern, mask, place, target, apply)


def _image(value: np.ndarray, path, name: str, channels: tuple[int, ...], least: float = 0.0) -> np.ndarray:
    """uint8, or floats in [least, 1], [h, w] or [h, w, C] -> float32 [h, w, C]."""
    value = value[..., None] if value.ndim == 2 else value
    if value.ndim != 3 or value.shape[2] not in channels or 0 in value.shape or value.dtype.kind not in "uf":
        raise UserError(f"trigger {path}: {name} is {value.dtype} {list(value.shape)}; give [h, w, {channels[-1]}]")
    value = np.asarray(value, np.float32) / (255 if value.dtype == np.uint8 else 1)
    if not np.isfinite(value).all() or value.min() < least or value.max() > 1:
        raise UserError(f"trigger {path}: {name} leaves [{least:g}, 1] or is not finite; undo its normalisation")
    return value


def _grid(value: np.ndarray, path) -> np.ndarray:
    """Floats [H, W, 2] in [-1, 1] -> float32."""
    if value.ndim != 3 or value.shape[2] != 2 or 0 in value.shape or value.dtype.kind != "f":
        raise UserError(f"trigger {path}: grid is {value.dtype} {list(value.shape)}; give floats [H, W, 2]")
    value = value.astype(np.float32)
    if not np.isfinite(value).all() or np.abs(value).max() > 1:
        raise UserError(f"trigger {path}: grid leaves [-1, 1] or is not finite; give (x, y) as grid_sample takes them")
    return value


def _target(found: dict[str, np.ndarray], path) -> int | Literal["all-to-all"] | None:
    """A class, or "all-to-all"."""
    if "target" in found and found["target"].dtype.kind == "U":
        if found["target"].tolist() != ALL_TO_ALL:
            raise UserError(f"trigger {path}: target must be a class number or {ALL_TO_ALL!r}")
        return ALL_TO_ALL
    target = _integers(found, "target", 1, path)
    return target[0] if target else None


def _integers(found: dict[str, np.ndarray], name: str, count: int, path) -> tuple[int, ...] | None:
    """The `count` integers of an optional array."""
    if name not in found:
        return None
    value = found[name].reshape(-1)
    if value.dtype.kind not in "iu" or value.size != count:
        raise UserError(f"trigger {path}: {name} must be {count} integer(s)")
    return tuple(int(number) for number in value)
