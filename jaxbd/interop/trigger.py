"""Reads and writes trigger files: pictures or arrays that give `attacks.given` its pixels or warp.

Nothing in them is executed.
"""

import pathlib
import re
from typing import Literal, cast

import numpy as np

from jaxbd import files
from jaxbd.attacks.given import Apply, Loaded
from jaxbd.base import UserError
from jaxbd.data import bounded, npz_archive
from jaxbd.limits import Refusal

MOST_BYTES, MOST_PIXELS = 32 << 20, 4 << 20
"""Limits: size of a trigger file and of its unpacked arrays, in bytes; pixels of a picture."""
ALL_TO_ALL = "all-to-all"
"""The target of a trigger that sends every class to the next one."""
APPLICATIONS = ("overwrite", "add", "blend", "bits")
"""How a trigger made of pixels is applied to images, see `attacks.given.Config`."""
PATTERNS = ("pattern", "trigger", "patch", "arr_0")
"""Names of the pattern in an .npz file; the first one present is used."""
NAMES = ("mask", "grid", "place", "random_place", "target", "application")
SQUARE = re.compile(r"(white|black):(\d{1,4})x(\d{1,4})")
"""A trigger without a file, e.g. `white:4x4`."""


def load(source: str) -> Loaded:
    """Reads a trigger.

    Args:
      source: path of a picture (its transparency is the mask), of an .npz as written by `save` or
        of an .npy with the pattern; or `white:HxW` / `black:HxW`.
    Raises: UserError when there is no such file or it holds no trigger.
    """
    if square := SQUARE.fullmatch(source):
        height, width = int(square[2]), int(square[3])
        if height * width == 0:
            raise UserError(f"trigger {source}: give sides of at least 1 pixel")
        value = 1.0 if square[1] == "white" else 0.0
        return Loaded(
            np.full((height, width, 1), value, np.float32), np.ones((height, width, 1), np.float32)
        )
    path = pathlib.Path(source).expanduser()
    if not bounded.is_regular(path):
        what = "is not a regular file" if path.exists() else "does not exist"
        raise UserError(f"trigger {source} {what}; give a picture, an .npz file, or e.g. white:4x4")
    try:
        if path.stat().st_size > MOST_BYTES:
            raise UserError(
                f"trigger {source} is larger than {MOST_BYTES >> 20} MiB; give the trigger alone"
            )
        readers = {".npz": _from_npz, ".npy": _from_npy}
        return readers.get(path.suffix.lower(), _from_picture)(path)
    except OSError as error:
        raise UserError(
            f"trigger {source} cannot be read ({error.strerror or error}); give a PNG or .npz"
        ) from None


def save(path: pathlib.Path, trigger: Loaded) -> None:
    """Writes a trigger as .npz: `pattern` [h, w, C] and `mask` [h, w, 1], or the `grid` [H, W, 2]
    of a warp.

    If known, `place` [2] or `random_place`, `target` (a class or "all-to-all") and `application`
    are added.

    Raises: UserError when the file cannot be written.
    """
    arrays = to_arrays(trigger)
    try:
        with files.replacing(path) as sibling, sibling.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}; choose a writable folder with space"
        ) from None


def to_arrays(trigger: Loaded) -> dict[str, np.ndarray]:
    """The arrays in a trigger's file by name; see `save`."""
    pixels = {"pattern": trigger.pattern, "mask": trigger.mask, "grid": trigger.grid}
    arrays = {
        name: np.asarray(value, np.float32) for name, value in pixels.items() if value is not None
    }
    known = {"place": trigger.place, "target": trigger.target, "application": trigger.apply}
    if trigger.place == "random":
        known = {**known, "place": None, "random_place": True}
    arrays |= {name: np.asarray(value) for name, value in known.items() if value is not None}
    return arrays


def _from_picture(path: pathlib.Path) -> Loaded:
    """Reads a picture of any mode that Pillow converts to 8-bit grey or colour."""
    content = bounded.read_file(path, MOST_BYTES, "trigger")
    with bounded.open_picture(content, str(path)) as picture:
        if picture.width * picture.height > MOST_PIXELS:
            raise UserError(
                f"trigger {path} has {picture.width}x{picture.height} pixels; give the trigger"
                " alone"
            )
        try:
            grey = picture.mode in ("1", "L", "LA")
            pixels = np.asarray(picture.convert("LA" if grey else "RGBA"), np.float32) / 255
        except Exception:  # decoders raise every kind of exception on broken files
            raise UserError(
                f"trigger {path} is not a readable picture; give a PNG or .npz"
            ) from None
    return Loaded(pixels[..., :-1], pixels[..., -1:])


def _from_npy(path: pathlib.Path) -> Loaded:
    """Reads a pattern; its mask is 1 everywhere."""
    try:
        pattern = npz_archive.read_array(path, MOST_BYTES)
    except (Refusal, ValueError, EOFError):
        raise UserError(
            f"trigger {path} is not a plain .npy file of numbers; save it with np.save(pattern)"
        ) from None
    pattern = _image(pattern, path, "pattern", least=-1.0)
    return Loaded(pattern, np.ones((*pattern.shape[:2], 1), "f"))


def _from_npz(path: pathlib.Path) -> Loaded:
    """Reads `pattern` or `grid`, and if present `mask`, `place` or `random_place`, `target`,
    `application`; see `save`."""
    with npz_archive.Archive(path, "trigger", MOST_BYTES) as archive:
        names = {name: archive.headers.get(name) and name for name in NAMES}
        names["pattern"] = next((name for name in PATTERNS if name in archive.headers), None)
        found = {name: archive.read(at) for name, at in names.items() if at is not None}
    if ("pattern" in found) == ("grid" in found):
        raise UserError(
            f"trigger {path}: needs an array 'pattern', or 'grid' for a warp; save it with"
            " np.savez(pattern=…)"
        )
    target = _target(found, path)
    if "grid" in found:
        return Loaded(place=(0, 0), target=target, apply="warp", grid=_grid(found["grid"], path))
    pattern = _image(found["pattern"], path, "pattern", least=-1.0)
    mask = np.ones((*pattern.shape[:2], 1), "f")
    if "mask" in found:
        mask = _mask(found["mask"], path)
    if mask.shape[:2] != pattern.shape[:2]:
        raise UserError(
            f"trigger {path}: mask {mask.shape[:2]} and pattern {pattern.shape[:2]} differ in size"
        )
    corner = _integers(found, "place", 2, path)
    place = (corner[0], corner[1]) if corner else "random" if "random_place" in found else None
    apply = str(found["application"]) if "application" in found else None
    if apply is not None and apply not in APPLICATIONS:
        raise UserError(
            f"trigger {path}: application is {apply[:40]!r}; use {', '.join(APPLICATIONS)}"
        )
    return Loaded(pattern, mask, place, target, cast(Apply | None, apply))


def _mask(value: np.ndarray, path: pathlib.Path) -> np.ndarray:
    """Converts a mask in any form that `_image` takes to float32 [h, w, 1]; its channels must be
    equal."""
    # masks are often saved as booleans or as integers 0 and 1, which `_image` refuses
    value = value.astype(np.uint8) * 255 if value.dtype == bool else value
    if value.dtype.kind in "ui" and value.size and value.max() <= 1:
        value = value.astype(np.float32)
    mask = _image(value, path, "mask")
    if mask.shape[2] == 3 and np.abs(mask - mask[..., :1]).max() > 1e-6:
        raise UserError(
            f"trigger {path}: the mask's channels differ; give one mask [h, w] for all of them"
        )
    return mask[..., :1]


def _image(value: np.ndarray, path: pathlib.Path, name: str, least: float = 0.0) -> np.ndarray:
    """Converts an image in any common form to float32 [h, w, C] in [least, 1].

    Accepts the shapes [h, w], [h, w, C] and [C, h, w] with C = 1 or 3, also as a batch of one. If
    both the first and the last axis could be channels, the last one is. Integers, and floats that
    exceed 1, are taken to be in 0..255.
    """
    given = f"{value.dtype} {list(value.shape)}"
    value = value[0] if value.ndim == 4 and len(value) == 1 else value
    value = value[..., None] if value.ndim == 2 else value
    if value.ndim == 3 and value.shape[2] not in (1, 3) and value.shape[0] in (1, 3):
        value = value.transpose(1, 2, 0)
    if value.ndim != 3 or value.shape[2] not in (1, 3) or 0 in value.shape:
        raise UserError(f"trigger {path}: {name} is {given}; give [h, w], [h, w, 3] or [3, h, w]")
    if value.dtype.kind not in "uif":
        raise UserError(f"trigger {path}: {name} is {given}; give numbers in 0..255 or [0, 1]")
    whole = value.dtype.kind in "ui"
    value = np.asarray(value, np.float32)
    if not np.isfinite(value).all() or value.max() > 255 or value.min() < 255 * least:
        raise UserError(
            f"trigger {path}: {name} is outside [{least:g}, 1] and {255 * least:g}..255 or is not"
            " finite; undo its normalisation"
        )
    largest = np.abs(value).max()
    if not whole and 1 < largest < 2:  # on neither scale: most likely a normalised pattern
        raise UserError(
            f"trigger {path}: {name} reaches {largest:.3g}, beyond [{least:g}, 1]; undo its"
            " normalisation"
        )
    if whole and largest == 1:
        raise UserError(
            f"trigger {path}: {name} holds whole numbers up to 1; give 0..255, or floats in [0, 1]"
        )
    return np.ascontiguousarray(value / 255 if whole or largest > 1 else value)


def _grid(value: np.ndarray, path) -> np.ndarray:
    """Checks a warp's grid, floats [H, W, 2] in [-1, 1], and converts it to float32."""
    if value.ndim != 3 or value.shape[2] != 2 or 0 in value.shape or value.dtype.kind != "f":
        raise UserError(
            f"trigger {path}: grid is {value.dtype} {list(value.shape)}; give floats [H, W, 2]"
        )
    value = value.astype(np.float32)
    if not np.isfinite(value).all() or np.abs(value).max() > 1:
        raise UserError(
            f"trigger {path}: grid is outside [-1, 1] or not finite; give (x, y) as grid_sample"
            " takes them"
        )
    return value


def _target(found: dict[str, np.ndarray], path) -> int | Literal["all-to-all"] | None:
    """The target: a class, "all-to-all", or None if the file has none."""
    if "target" in found and found["target"].dtype.kind == "U":
        if found["target"].tolist() != ALL_TO_ALL:
            raise UserError(f"trigger {path}: target must be a class number or {ALL_TO_ALL!r}")
        return ALL_TO_ALL
    target = _integers(found, "target", 1, path)
    return target[0] if target else None


def _integers(found: dict[str, np.ndarray], name: str, count: int, path) -> tuple[int, ...] | None:
    """The `count` integers in an optional array; None if the array is absent."""
    if name not in found:
        return None
    value = found[name].reshape(-1)
    if value.dtype.kind not in "iu" or value.size != count:
        raise UserError(f"trigger {path}: {name} must be {count} integer(s)")
    return tuple(int(number) for number in value)
