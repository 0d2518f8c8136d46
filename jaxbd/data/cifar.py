"""CIFAR-10 and CIFAR-100 as published: binary or Python batches, in a folder or a .tar.gz.

Python batches are pickles; `cifar_pickle` reads them without executing anything.
"""

import gzip
import io
import os
import tarfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxbd.base import Dataset, UserError
from jaxbd.data import bounded, cifar_pickle, labels, pack, splits
from jaxbd.limits import Refusal, watched

MAX_FILE = 256 * 2**20
"""Size limit of a batch file, in bytes (CIFAR-100's training file has 155 million)."""
MAX_ARCHIVE = 512 * 2**20
FREE_ARCHIVE, ARCHIVE_EXPANSION = 16 * 2**20, 8
"""Limits on an archive's unpacked bytes: the hard cap, the allowance for any archive, and bytes per
byte of archive. CIFAR's archives unpack to 1.1 times their size, a hostile one to 1,000 times."""
MAX_MEMBERS = 1_000
FOLDERS = ("cifar-10-batches-bin", "cifar-100-binary", "cifar-10-batches-py", "cifar-100-python")


class Layout(NamedTuple):
    """One published layout.

    Attributes:
      classes: number of classes.
      train, test: file names of each split.
      names: file with the class names.
      head: label bytes before each image in binary batches; 0 for Python batches.
      labels: key of the labels in Python batches.
    """

    classes: int
    train: tuple[str, ...]
    test: tuple[str, ...]
    names: str
    head: int
    labels: str


_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
LAYOUTS = (
    Layout(
        10,
        tuple(f"{name}.bin" for name in _BATCHES),
        ("test_batch.bin",),
        "batches.meta.txt",
        1,
        "",
    ),
    Layout(100, ("train.bin",), ("test.bin",), "fine_label_names.txt", 2, ""),
    Layout(10, _BATCHES, ("test_batch",), "batches.meta", 0, "labels"),
    Layout(100, ("train",), ("test",), "meta", 0, "fine_labels"),
)

Files = Mapping[str, Callable[[], bytes]]


def load(
    path: str | Path,
    *,
    split: str = "test",
    classes: labels.Classes = labels.Classes(),
) -> Dataset:
    """Reads `split` ("train" or "test") of the archive at `path` as uint8 [N, 32, 32, 3] with its
    (fine) labels.

    Raises: UserError when batches are missing or have a wrong size, or a pickle asks for anything
      but plain arrays.
    """
    path = Path(path)
    split = splits.name(split) or split
    if split not in ("train", "test"):
        raise UserError(f"data {path} has no split {split!r}; it has train, test")
    files = _archive(path) if path.is_file() else _folder(path)
    layout = next((each for each in LAYOUTS if _present(files, each.train + each.test)), None)
    if layout is None:
        raise UserError(
            f"data {path} has no CIFAR batches; give a folder or .tar.gz with data_batch_* or"
            " train/test"
        )
    batches = _present(files, getattr(layout, split))
    if not batches:
        raise UserError(
            f"data {path} has no {split} batches; add {', '.join(getattr(layout, split))}"
        )
    read = _binary if layout.head else _python
    names = _class_names(files, layout, path)
    parts = [read(files[name](), layout, f"{path}: {name}") for name in batches]
    images, numbers = (np.concatenate(each) for each in zip(*parts, strict=True))
    # pixels are stored channel by channel
    images = np.ascontiguousarray(images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return pack.dataset(images, numbers, names, str(path), classes)


def is_cifar(path: Path) -> bool:
    """Whether the folder `path` holds CIFAR batches."""
    files = _folder(path)
    return any(_present(files, layout.train + layout.test) for layout in LAYOUTS)


def _present(files: Files, names: tuple[str, ...]) -> list[str]:
    return [name for name in names if name in files]


def _folder(path: Path) -> Files:
    """Readers of the CIFAR files in `path`, or in a sub-folder with one of the published names."""
    if not path.is_dir():
        raise UserError(f"data {path} does not exist; check the path")
    for folder in (path, *(path / name for name in FOLDERS)):
        wanted = [
            folder / name
            for layout in LAYOUTS
            for name in (*layout.train, *layout.test, layout.names)
        ]
        files = {
            # bind `file` now; a closure would read the loop's last value
            file.name: lambda file=file: bounded.read_file(file, MAX_FILE, "CIFAR batch")
            for file in wanted
            if bounded.is_regular(file)
        }
        if files:
            return files
    return {}


def _archive(path: Path) -> Files:
    """The batches of a tar archive, unpacked in memory. Writes nothing and skips links."""
    wanted = {name for layout in LAYOUTS for name in (*layout.train, *layout.test, layout.names)}
    contents = {}
    try:
        with path.open("rb") as file:
            zipped = file.peek(2)[:2] == b"\x1f\x8b"
            size = os.fstat(file.fileno()).st_size
            most = min(MAX_ARCHIVE, max(FREE_ARCHIVE, ARCHIVE_EXPANSION * size))
            deadline = bounded.LIMITS.deadline("it", 3 * size)
            packed = watched(file, deadline)
            # one byte above the limit shows that there is more, without reading all of it
            unpacked = (gzip.GzipFile(fileobj=packed) if zipped else packed).read(most + 1)
        if len(unpacked) > most:
            raise UserError(
                f"data {path} unpacks to more than {most >> 20} MiB, too large for CIFAR; fetch it"
                " again"
            )
        within = watched(io.BytesIO(unpacked), deadline)
        with tarfile.open(fileobj=within, mode="r:") as archive:
            for count, member in enumerate(archive):
                deadline.check()
                if count > MAX_MEMBERS:
                    raise UserError(
                        f"data {path} holds more than {MAX_MEMBERS:,} files, too many for CIFAR;"
                        " fetch it again"
                    )
                name = member.name.rsplit("/", 1)[-1]
                if member.size < 0:  # would move the reader backwards, in an endless loop
                    raise tarfile.ReadError("negative size")
                # a sparse member can claim any size
                plain = member.isreg() and not member.issparse()
                if name in wanted and plain and member.size <= MAX_FILE:
                    inside = archive.extractfile(member)
                    contents[name] = b"" if inside is None else inside.read()
    except Refusal as refusal:
        raise UserError(f"data {path}: {refusal}; fetch it again") from None
    # RecursionError: extended headers that each announce another one
    except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError, RecursionError):
        raise UserError(f"data {path} is not a readable .tar.gz archive; fetch it again") from None
    return {name: lambda content=content: content for name, content in contents.items()}


def _binary(content: bytes, layout: Layout, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels [N, 3072] and labels [N] of a binary batch.

    Each record has `layout.head` label bytes, the last of which is the (fine) class, then an image.
    """
    record = layout.head + 3072
    if not content or len(content) % record:
        raise UserError(
            f"data {where} has {len(content)} bytes, not a multiple of {record}; fetch it again"
        )
    rows = np.frombuffer(content, np.uint8).reshape(-1, record)
    return rows[:, layout.head :], _in_range(rows[:, layout.head - 1], layout, where)


def _python(content: bytes, layout: Layout, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels [N, 3072] and labels [N] of a pickled batch."""
    batch = cifar_pickle.read(content, where)
    pixels: Any = batch.get("data")
    numbers: Any = batch.get(layout.labels)
    is_array = isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8
    if not is_array or pixels.ndim != 2 or pixels.shape[1] != 3072:
        raise UserError(f"data {where} has no uint8 array 'data' [N, 3072]; fetch it again")
    whole = isinstance(numbers, np.ndarray) or (
        isinstance(numbers, list) and all(type(label) is int for label in numbers)
    )
    if numbers is None or not whole or np.shape(numbers) != (len(pixels),):
        raise UserError(
            f"data {where} has no list {layout.labels!r} of {len(pixels)} numbers; fetch it again"
        )
    return pixels, _in_range(numbers, layout, where)


def _in_range(numbers: Any, layout: Layout, where: str) -> np.ndarray:
    """Labels [N] as int64. Raises: UserError when one is out of range."""
    wrong = [label for label in numbers if not 0 <= label < layout.classes]
    if wrong:
        raise UserError(
            f"data {where} has label {wrong[0]}, not in 0..{layout.classes - 1}; fetch it again"
        )
    return np.asarray(numbers, np.int64)


def _class_names(files: Files, layout: Layout, path: Path) -> list[str] | None:
    """The K class names, or None if the archive does not give them."""
    if layout.names not in files:
        return None
    content = files[layout.names]()
    if layout.head:
        names = content.decode("latin1").split()
    else:
        meta = cifar_pickle.read(content, f"{path}: {layout.names}")
        names = meta.get("label_names" if layout.classes == 10 else "fine_label_names")
    if (
        not isinstance(names, list)
        or len(names) != layout.classes
        or not all(isinstance(name, str | bytes) for name in names)
    ):
        raise UserError(
            f"data {path}: {layout.names} does not name {layout.classes} classes; fetch it again or"
            " remove it"
        )
    return [name.decode("latin1") if isinstance(name, bytes) else name for name in names]
