"""What the sources share: which rows to read, decoding image files safely, and checked packing into a `Dataset`."""

import functools
import io
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from jaxbd.base import Dataset, UserError

FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "GIF", "PPM")
"""The only decoders that are ever tried: others hand files to outside programs (EPS) or have no use here."""
MAX_PIXELS = 50_000_000
"""Largest image, in pixels, that is decoded; a small file can claim any size."""
MAX_CLASSES = 100_000
"""Labels from here on are no class numbers; default names for them would fill the memory."""

AT_ONCE = 128
"""Image files that are in memory, encoded, while the decoding threads work."""

Shape = tuple[int, int, int]


def chosen_rows(total: int, limit: int | None, seed: int) -> np.ndarray:
    """Rows [min(limit, total)] int64, ascending, drawn without replacement from 0..total-1; all rows without a limit.

    With one seed a smaller limit chooses a subset of a larger one's rows.

    Raises: UserError when the limit is below 1.
    """
    if limit is None:
        return np.arange(total)
    if limit < 1:
        raise UserError(f"limit {limit} leaves no images; give at least 1")
    return np.sort(np.random.default_rng(seed).permutation(total)[:limit])


def dataset(images: np.ndarray, labels: Any, class_names: Iterable[str] | None, name: str) -> Dataset:
    """Packs uint8 `images` [N, H, W, C] and integer `labels` [N] (or [N, 1]); names default to "0", "1", ….

    Raises: UserError when there are no images, when the labels are not N whole numbers from 0, or have no name.
    """
    labels = np.asarray(labels)
    if len(images) == 0:
        raise UserError(f"data {name} holds no images; give at least one")
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        given = f"{labels.dtype} {list(labels.shape)}"
        raise UserError(f"data {name}: labels are {given}; give one whole class number per image, [N] int")
    if len(labels) != len(images):
        raise UserError(f"data {name}: {len(images)} images but {len(labels)} labels; give one label per image")
    if labels.min() < 0 or labels.max() >= MAX_CLASSES:
        raise UserError(f"data {name}: labels run from {labels.min()} to {labels.max()}; give class numbers 0..K-1")
    count = int(labels.max()) + 1
    names = tuple(str(k) for k in range(count)) if class_names is None else tuple(str(k) for k in class_names)
    if len(names) < count:
        raise UserError(f"data {name}: label {count - 1} has no name, there are {len(names)} class names; add the rest")
    return Dataset(images, labels.astype(np.int32), names, name)


def decode(
    named: Iterable[tuple[str, bytes]],
    count: int,
    *,
    image_shape: Shape | None = None,
    channels: int | None = None,
    zoom: float | None = None,
) -> np.ndarray:
    """Decodes `count` image files, given as (name for messages, content), to uint8 [count, H, W, C].

    Only the first frame is read, transparency is dropped, EXIF rotation is ignored. Grey from colour is
    0.299 R + 0.587 G + 0.114 B. Files are taken from `named` a few at a time and decoded by several threads.

    Args:
      image_shape: (H, W, C) wanted: images are resized (bilinear, antialiased, sides independently) where they differ.
        Without it all images must share one size.
      channels: 1 or 3; ignored with `image_shape`. By default 1 when every image is grey, otherwise 3.
      zoom: see `fit`.
    Raises: UserError naming the image that is unreadable, of more than 8 bits a channel, over `MAX_PIXELS` or of
      another size than the first.
    """
    wanted = image_shape[2] if image_shape else channels
    if wanted not in (None, 1, 3):
        raise UserError(f"image files give 1 or 3 channels, not {wanted}; use a .npz file with 1 or 3")
    from PIL import Image

    with warnings.catch_warnings():
        # files with odd metadata make Pillow talk; a size it suspects is refused below, never decoded
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        one = functools.partial(_decode_one, image_shape=image_shape, channels=wanted, zoom=zoom)
        with ThreadPoolExecutor() as threads:
            return stack(_in_order(threads, one, iter(named)), count)


def _in_order(
    threads: ThreadPoolExecutor,
    one: Callable[[tuple[str, bytes]], tuple[str, np.ndarray]],
    named: Iterator[tuple[str, bytes]],
) -> Iterator[tuple[str, np.ndarray]]:
    """`one` of every file in the order of `named`, `AT_ONCE` files in memory at a time."""
    while chunk := list(itertools.islice(named, AT_ONCE)):
        yield from threads.map(one, chunk)


def _decode_one(
    file: tuple[str, bytes], image_shape: Shape | None, channels: int | None, zoom: float | None
) -> tuple[str, np.ndarray]:
    """One image file (name, content) -> (name, uint8 [H, W, C])."""
    name, content = file
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            if image.mode[0] in "IF":
                raise UserError(f"image {name!r} has more than 8 bits a channel; convert it to 8 bits")
            return name, fit(image, image_shape, channels, zoom)
    except UserError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UserError(f"image {name!r} is larger than {MAX_PIXELS:,} pixels; scale it down or remove it") from None
    except Exception:  # decoders meet broken files with any exception there is
        raise UserError(f"image {name!r} is corrupt or not {', '.join(FORMATS)}; replace or remove it") from None


def fit(image: Any, image_shape: Shape | None, channels: int | None, zoom: float | None = None) -> np.ndarray:
    """A Pillow image -> uint8 [H, W, C] of `image_shape`, or of its own size with `channels` (None: as it is).

    Args:
      zoom: at least 1. The image keeps its proportions: it is resized until it just covers `zoom` times the shape
        wanted, and the middle is cut out. Without it both sides are resized to the shape, independently.
    """
    from PIL import Image

    if channels is None:
        channels = 1 if image.mode in ("1", "L", "LA") else 3
    image = image.convert("L" if channels == 1 else "RGB")
    if image_shape and zoom:
        image = _middle(image, image_shape[:2], zoom)
    elif image_shape and image.size != (image_shape[1], image_shape[0]):
        image = image.resize((image_shape[1], image_shape[0]), Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(image.height, image.width, channels)


def _middle(image: Any, sides: tuple[int, int], zoom: float) -> Any:
    """A Pillow image -> its middle of `sides` (height, width), as torchvision's `Resize` and `CenterCrop` cut it.

    For a square: the shorter side becomes zoom x side, the longer one is rounded down.
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


def stack(named: Iterable[tuple[str, np.ndarray]], count: int) -> np.ndarray:
    """`count` images uint8 [H, W, C], given as (name, pixels), in one array; grey ones among colour become colour.

    Raises: UserError naming the first image whose size differs from the first one's, or when memory is short.
    """
    images, first = np.empty((0,), np.uint8), ""
    try:
        for row, (name, pixels) in enumerate(named):
            if row == 0:
                images, first = np.empty((count, *pixels.shape), np.uint8), name
            if pixels.shape[:2] != images.shape[1:3]:
                sizes = f"{pixels.shape[0]}x{pixels.shape[1]} but {first!r} is {images.shape[1]}x{images.shape[2]}"
                raise UserError(f"image {name!r} is {sizes}; resize them or state the image shape wanted")
            if pixels.shape[2] > images.shape[3]:
                images = np.repeat(images, pixels.shape[2], axis=-1)
            images[row] = pixels
    except MemoryError:
        raise UserError(f"{count} images do not fit into memory; lower the limit or the image shape") from None
    return images
