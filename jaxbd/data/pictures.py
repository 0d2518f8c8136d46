"""Decodes pictures to uint8 arrays of one size, with several threads and bounded memory."""

import functools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from jaxbd.base import UserError
from jaxbd.data import bounded
from jaxbd.limits import Deadline, Refusal

SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
"""Suffixes of files that are read as pictures. The decoder is chosen by the first bytes."""
AT_ONCE, BYTES_AT_ONCE = 128, 64 << 20
"""Maximum number and bytes of encoded pictures in memory while the threads decode."""
GREY = ("1", "L", "LA")
"""Pillow's modes for grey pictures."""
OWN_SIZE_BYTES = 2 << 30
"""Maximum total bytes of pictures that are not resized."""

Shape = tuple[int, int, int]
"""(H, W, C). H = W = 0 stands for the size that all pictures share."""


Seen = list[tuple[bool, int, int]]
"""(is_grey, height, width) of each picture before conversion."""


class SizesDiffer(UserError):
    """The pictures do not share a size, or they share one too large to hold in memory."""


def decode(
    named: Iterable[tuple[str, bytes]],
    count: int,
    *,
    image_shape: Shape | None = None,
    zoom: float | None = None,
    seen: Seen | None = None,
) -> np.ndarray:
    """Decodes `count` pictures, given as (name for messages, content), to uint8 [count, H, W, C].

    Reads only the first frame, drops transparency and ignores EXIF rotation. Grey is computed from
    colour as 0.299 R + 0.587 G + 0.114 B.

    Args:
      image_shape: required (H, W, C). Pictures of another size are resized (bilinear, antialiased,
        each side independently). With H = W = 0 all must share one size. With None they must too,
        and C is 1 if every picture is grey, else 3.
      zoom: see `fit`.
      seen: if given, each picture's original mode and size are appended, for `describe_changes`.
    Raises: UserError naming the picture that is unreadable, has more than 8 bits per channel or
      exceeds a limit of `bounded`; SizesDiffer naming the first picture of another size.
    """
    if image_shape and image_shape[2] not in (1, 3):
        raise UserError(
            f"image files give 1 or 3 channels, not {image_shape[2]}; use a .npz file with 1 or 3"
        )
    from PIL import Image

    with warnings.catch_warnings():
        # Pillow warns about odd metadata, and about sizes that `open_picture` refuses anyway
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        Image.init()  # imports the decoders now, so their import time is charged to no picture
        one = functools.partial(
            _decode_one,
            budget=bounded.PixelBudget(),
            image_shape=image_shape,
            zoom=zoom,
            seen=[] if seen is None else seen,
        )
        with ThreadPoolExecutor() as threads:
            return stack(_in_order(threads, one, iter(named)), count)


def _in_order(
    threads: ThreadPoolExecutor,
    one: Callable[[tuple[str, bytes]], tuple[str, np.ndarray]],
    named: Iterator[tuple[str, bytes]],
) -> Iterator[tuple[str, np.ndarray]]:
    """Maps `one` over `named` in order, with a bounded number of files in memory."""
    waiting: list[tuple[str, bytes]] = []
    held = 0
    for file in named:
        waiting.append(file)
        held += len(file[1])
        if len(waiting) == AT_ONCE or held >= BYTES_AT_ONCE:
            yield from threads.map(one, waiting)
            waiting, held = [], 0
    yield from threads.map(one, waiting)


def _decode_one(
    file: tuple[str, bytes],
    budget: bounded.PixelBudget,
    image_shape: Shape | None,
    zoom: float | None,
    seen: Seen,
) -> tuple[str, np.ndarray]:
    """Decodes one picture (name, content) to (name, uint8 [H, W, C])."""
    name, content = file
    deadline = budget.deadline(len(content))
    try:
        with bounded.open_picture(content, name, deadline) as image:
            pixels = image.width * image.height
            seen.append((image.mode in GREY, image.height, image.width))
            if pixels <= bounded.LARGE_PICTURE:
                return name, _fit_in_time(image, image_shape, zoom, deadline)
            budget.spend(pixels, len(content), name)
            with budget.alone:
                return name, _fit_in_time(image, image_shape, zoom, deadline)
    except UserError as error:
        raise budget.failed(error) from None
    except Refusal as refusal:
        raise budget.failed(bounded.too_long(name, refusal)) from None
    except Exception:  # decoders raise every kind of exception on broken files
        raise budget.failed(bounded.corrupt(name)) from None


def _fit_in_time(
    image: Any, image_shape: Shape | None, zoom: float | None, deadline: Deadline
) -> np.ndarray:
    pixels = fit(image, image_shape, zoom)
    deadline.check()
    return pixels


def fit(image: Any, image_shape: Shape | None, zoom: float | None = None) -> np.ndarray:
    """Converts a Pillow image to uint8 [H, W, C] of `image_shape`, see `decode`.

    Args:
      zoom: at least 1. Keeps the proportions: resizes the image to just cover `zoom` times the
        target shape, then crops the middle. Without it each side is resized independently.
    """
    from PIL import Image

    if image_shape is None:
        image_shape = (0, 0, 1 if image.mode in GREY else 3)
    height, width, channels = image_shape
    image = image.convert("L" if channels == 1 else "RGB")
    if height and zoom:
        image = _crop_middle(image, (height, width), zoom)
    elif height and image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(image.height, image.width, channels)


def _crop_middle(image: Any, sides: tuple[int, int], zoom: float) -> Any:
    """Resizes a Pillow image and crops the middle of `sides` (height, width), like torchvision's
    `Resize` and `CenterCrop`.

    For a square crop the shorter side becomes zoom x side and the longer one is rounded down.
    """
    from PIL import Image

    height, width = sides
    if image.height * width <= image.width * height:
        tall = round(zoom * height)
        wide = max(tall * image.width // image.height, width)
    else:
        wide = round(zoom * width)
        tall = max(wide * image.height // image.width, height)
    if image.size != (wide, tall):
        image = image.resize((wide, tall), Image.Resampling.BILINEAR)
    top, left = round((tall - height) / 2), round((wide - width) / 2)
    return image.crop((left, top, left + width, top + height))


def describe_changes(seen: Seen, shape: tuple[int, ...]) -> tuple[str, ...]:
    """One line about pictures that were resized, one about those converted to or from grey.

    Args:
      shape: (H, W, C) after decoding.
    """
    total, (height, width, channels) = len(seen), shape
    sizes = [each[1:] for each in seen if each[1:] != (height, width)]
    changed = sum(grey != (channels == 1) for grey, *_ in seen)
    lines = []
    if sizes:
        low, high = min(sizes, key=math.prod), max(sizes, key=math.prod)
        named = "x".join(map(str, low))
        if high != low:
            named = f"{named} to {'x'.join(map(str, high))}"
        lines.append(
            f"{len(sizes)} of {total} pictures were resized to {height}x{width} (from {named})"
        )
    if changed:
        what = "are grey and became RGB" if channels == 3 else "are in colour and became grey"
        lines.append(f"{changed} of {total} pictures {what}, as the model takes them")
    return tuple(lines)


def stack(named: Iterable[tuple[str, np.ndarray]], count: int) -> np.ndarray:
    """Stacks `count` images uint8 [H, W, C], given as (name, pixels), into one array.

    Grey images become colour as soon as one image is in colour.

    Raises: SizesDiffer naming the first image of another size than the first; UserError when memory
      runs out.
    """
    images: Any = np.empty((0, 0, 0, 0), np.uint8)
    first = ""
    try:
        for row, (name, pixels) in enumerate(named):
            if row == 0:
                _check_total(count, pixels)
                images, first = np.empty((count, *pixels.shape), np.uint8), name
            if pixels.shape[:2] != images.shape[1:3]:
                sizes = (
                    f"{pixels.shape[0]}x{pixels.shape[1]} but {first!r} is"
                    f" {images.shape[1]}x{images.shape[2]}"
                )
                raise SizesDiffer(
                    f"image {name!r} is {sizes}; resize them or state the image shape wanted"
                )
            if pixels.shape[2] > images.shape[3]:  # the first colour image after grey ones
                images = np.repeat(images, pixels.shape[2], axis=-1)
            images[row] = pixels  # a grey image broadcasts over the colour channels
    except MemoryError:
        raise UserError(
            f"{count} images do not fit into memory; lower the limit or the image shape"
        ) from None
    return images


def _check_total(count: int, pixels: np.ndarray) -> None:
    """Raises SizesDiffer when `count` large images of this size would exceed `OWN_SIZE_BYTES`.

    Images up to 512 x 512 are always allowed; larger ones are larger than classifiers take.
    """
    large = pixels.shape[0] * pixels.shape[1] > 512 * 512
    if large and count * pixels.size > OWN_SIZE_BYTES:
        raise SizesDiffer(
            f"{count} images of {pixels.shape[0]}x{pixels.shape[1]} take more than"
            f" {OWN_SIZE_BYTES >> 30} GiB; state the image shape wanted"
        )
