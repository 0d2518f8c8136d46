"""IDX files (MNIST, Fashion-MNIST, KMNIST, EMNIST), plain or .gz."""

import gzip
import re
import struct
import zlib
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from jaxbd.base import Dataset, UserError
from jaxbd.data import bounded, labels, pack, splits
from jaxbd.limits import Refusal, watched

IMAGES = re.compile(r"(.*)images([-.]idx[34][-.]ubyte)(\.gz)?", re.IGNORECASE)
BELOW = ("", "raw", "MNIST/raw", "FashionMNIST/raw", "KMNIST/raw", "EMNIST/raw")
"""Sub-folders searched for the files; torchvision stores them in `raw`."""
UNSIGNED_BYTES = 8
"""IDX type code of images and labels."""


class Pair(NamedTuple):
    """A file of images and the file of their labels beside it."""

    images: Path
    labels: Path


def find(path: Path) -> dict[str, Pair]:
    """{file name's prefix, such as "t10k-": its pair of files} in a folder.

    A plain file wins over a .gz. A path to an image file counts as a folder with only this file.
    """
    if not path.is_dir():
        entries = [path]
    else:
        places = (path / below for below in BELOW)
        entries = next((found for at in places if (found := _files(at))), [])
    pairs: dict[str, Pair] = {}
    for entry in sorted(entries, key=lambda file: file.name, reverse=True):
        match = IMAGES.fullmatch(entry.name)
        if match is None:
            continue
        start, middle, zipped = match[1], match[2].replace("idx3", "idx1"), match[3] or ""
        beside = [entry.with_name(f"{start}labels{middle}{end}") for end in (zipped, "", ".gz")]
        label_file = next(filter(bounded.is_regular, beside), beside[0])
        pairs[start] = Pair(entry, label_file)
    return pairs


def _files(place: Path) -> list[Path]:
    if not place.is_dir():
        return []
    return [e for e in place.iterdir() if IMAGES.fullmatch(e.name) and bounded.is_regular(e)]


def load(
    path: Path,
    *,
    split: str = "test",
    limit: int | None = None,
    seed: int = 0,
    classes: labels.Classes = labels.Classes(),
) -> Dataset:
    """Reads `split` ("test" is also called t10k) as uint8 [N, H, W, 1].

    Raises: UserError when a file is missing or damaged, or the folder holds several such sets.
    """
    pairs = find(path)
    if path.is_dir():
        parts: dict[str, Pair] = {}
        for start, pair in pairs.items():
            part = splits.name_in(start) or start or "unnamed"
            if part in parts:
                names = f"{parts[part].images.name}, {pair.images.name}"
                raise UserError(f"data {path} has several {part} sets ({names}); name one file")
            parts[part] = pair
        pair, notes = splits.choose(parts, split, f"data {path}")
    else:
        (pair,), notes = pairs.values(), ()
    numbers = _read(pair.labels, 1)
    images = _read(pair.images, 3)
    if len(images) != len(numbers):
        raise UserError(
            f"data {pair.images} has {len(images)} images, {pair.labels.name} {len(numbers)}"
            " labels; fetch them again"
        )
    rows = pack.chosen_rows(len(images), limit, seed)
    # number all labels, not only the drawn rows: a draw may miss a class
    numbers, every = labels.number(numbers, None, classes, f"data {pair.images}")
    return pack.dataset(
        images[rows][..., None], numbers[rows], every, str(pair.images), classes, notes
    )


def _read(path: Path, rank: int) -> np.ndarray:
    """Reads a uint8 array of `rank` dimensions; checks the header before allocating anything."""
    if not bounded.is_regular(path):
        raise UserError(f"data {path} is missing; put it beside the images")
    most = bounded.max_unpacked(path.stat().st_size)
    try:
        with path.open("rb") as plain:
            zipped = plain.peek(2)[:2] == b"\x1f\x8b"
            # a .gz of a million empty members would keep unpacking without end
            deadline = bounded.LIMITS.deadline("it", 3 * path.stat().st_size)
            file: Any = gzip.GzipFile(fileobj=watched(plain, deadline)) if zipped else plain
            shape = _header(file, rank, path)
            count = int(np.prod(shape, dtype=object))  # Python integers cannot overflow
            if count > most:
                raise UserError(f"data {path} claims {count:,} bytes, the limit is {most:,}")
            content = file.read(count + 1)  # one more byte, to notice trailing data
    except Refusal as refusal:
        raise UserError(f"data {path}: {refusal}; fetch it again") from None
    except (EOFError, OSError, zlib.error, struct.error):
        raise _describe_damage(path) from None
    if len(content) != count:
        raise _describe_damage(path)
    return np.frombuffer(content, np.uint8).reshape(shape)


def _header(file: BinaryIO, rank: int, path: Path) -> tuple[int, ...]:
    zeros, kind, found = struct.unpack(">HBB", file.read(4))
    if zeros or kind != UNSIGNED_BYTES or found != rank:
        raise UserError(
            f"data {path} is not a {rank}-dimensional IDX file of bytes; fetch it again"
        )
    return struct.unpack(f">{rank}I", file.read(4 * rank))


def _describe_damage(path: Path) -> UserError:
    return UserError(f"data {path} is damaged; fetch it again")
