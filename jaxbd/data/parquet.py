"""Parquet tables in the layout of dataset hubs, and Arrow files of `datasets.save_to_disk`.

Both hold encoded images and labels, with class names in the metadata. `parquet_worker` reads them
in a separate process with limited memory and CPU time, because an Arrow call cannot be bounded from
outside.
"""

import contextlib
import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from jaxbd.base import Dataset, UserError
from jaxbd.data import bounded, folder, labels, pack, pictures, splits

IMAGE_COLUMNS = (
    *("image", "img", "jpg", "jpeg", "png", "webp", "pixel_values", "picture", "photo"),
    *("image_bytes", "bytes"),
)
LABEL_COLUMNS = (
    "label",
    "fine_label",
    "labels",
    "target",
    "cls",
    "class",
    "class_label",
    "category",
)
"""Column names in order of preference."""
MAX_FILES = 10_000
MOST_FOLDERS = 200
"""Maximum folders per level that are searched for tables; more must be class folders of images."""
BYTES_PER_SECOND = 4 << 20
"""Minimum rate of the worker per CPU second, however the tables are packed."""
WORKER = Path(__file__).with_name("parquet_worker.py")


def load(
    path: str | Path,
    *,
    split: str = "test",
    image_shape: pictures.Shape | None = None,
    limit: int | None = None,
    seed: int = 0,
    classes: labels.Classes = labels.Classes(),
) -> Dataset:
    """Reads one table (whatever its split), or a folder's shards of `split` sorted by name.

    A table needs one of `IMAGE_COLUMNS` (plain bytes, or a struct of `bytes` and `path`) and one of
    `LABEL_COLUMNS` (in any form of `labels.number`).

    Args:
      image_shape: see `pictures.decode`.
      limit: maximum number of images, drawn with `seed` before anything is decoded.
    Raises: UserError when files, the split or a column are missing, or on damaged files and bad
      images.
    """
    files, notes = shards(Path(path), split)
    with _worker(files) as (ask, stream):
        about = ask(
            {
                "files": [str(f) for f in files],
                "images": IMAGE_COLUMNS,
                "labels": LABEL_COLUMNS,
                "seconds": bounded.LIMITS.seconds,
                "bytes_per_second": BYTES_PER_SECOND,
            }
        )
        rows = pack.chosen_rows(sum(about["rows"]), limit, seed)
        names = _class_names(about, files[0])
        if names is not None and classes.count not in (None, len(names)):
            # raises the same error as after reading, but before any decoding
            labels.number([0], names, classes, f"data {path}")
        if not len(rows):
            raise UserError(f"data {path} holds no images; give at least one")
        given: list[Any] = []
        found = _images(path, ask, stream, rows, given)
        seen: pictures.Seen = []
        images = pictures.decode(found, len(rows), image_shape=image_shape, seen=seen)
    notes += pictures.describe_changes(seen, images.shape[1:])
    # number all labels, not only the drawn rows: a draw may miss a class and shift the numbers
    numbers, every = labels.number(_as_array(given, path), names, classes, f"data {path}")
    if len(numbers) > len(rows):
        numbers = numbers[rows]
    return pack.dataset(images, numbers, every, str(path), classes, notes)


def _as_array(given: list[Any], path: str | Path) -> np.ndarray:
    try:
        return np.asarray(given) if given else np.zeros(0, np.int64)
    except (ValueError, OverflowError):
        raise UserError(f"data {path}: labels are of several kinds; give class numbers") from None


def shards(path: Path, split: str) -> tuple[list[Path], tuple[str, ...]]:
    """The tables of `split`, and notes for the user.

    A table belongs to the split that its name starts with, or that its folder is named after. If no
    table belongs to any split, all are taken.
    """
    if bounded.is_regular(path):
        return [path], ()
    if not path.exists():
        raise UserError(f"data {path} does not exist; check the path")
    files = tables(path)
    if not files:
        raise UserError(f"data {path} has no parquet files; check the path")
    if len(files) > MAX_FILES:
        raise UserError(f"data {path} has {len(files)} tables, the limit is {MAX_FILES}; name one")
    parts = splits.group(files)
    return splits.choose(parts, split, f"data {path}") if parts else (files, ())


def tables(path: Path) -> list[Path]:
    """The Parquet files in the folder `path` or up to three levels below, else the Arrow files.

    Only files of the first level that has any are returned, sorted by path.
    """
    for suffix in (".parquet", ".arrow"):
        level = [path]
        for _ in range(4):
            entries = [entry for place in level for entry in place.iterdir()]
            visible = [entry for entry in entries if folder.is_visible(entry.name)]
            found = [e for e in visible if e.suffix == suffix and bounded.is_regular(e)]
            if found:
                return sorted(found)
            level = [entry for entry in visible if entry.is_dir()]
            if len(level) > MOST_FOLDERS:
                break
    return []


@contextlib.contextmanager
def _worker(files: list[Path]) -> Iterator[tuple[Any, IO[bytes]]]:
    """Starts the worker; yields (a function that sends it a request, its output stream)."""
    process = subprocess.Popen(
        [sys.executable, "-I", str(WORKER)],  # -I: no PYTHON* variables, no user site-packages
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    questions, answers = process.stdin, process.stdout
    assert questions is not None and answers is not None

    def ask(question: dict[str, Any] | None, reply: bool = True) -> dict[str, Any]:
        try:
            if question is not None:
                questions.write(json.dumps(question).encode() + b"\n")
                questions.flush()
            answer = json.loads(answers.readline()) if reply else {}
        except (OSError, ValueError):
            raise UserError(
                f"data {files[0]} takes more memory or time than any table of images; fetch it"
                " again"
            ) from None
        if "error" in answer:
            raise UserError(f"data {answer['error']}")
        return answer

    try:
        yield ask, answers
    finally:
        process.kill()
        process.wait()
        questions.close()
        answers.close()


def _images(
    path: str | Path, ask: Any, stream: IO[bytes], rows: np.ndarray, given: list[Any]
) -> Iterator[tuple[str, bytes]]:
    """Yields (name, encoded image) of the chosen `rows`, then extends `given` by the labels: of all
    rows, or of these if they are lists."""
    ask({"rows": rows.tolist()}, reply=False)
    for row in rows:
        size = _next_size(stream)
        if size < 0:  # the worker failed; its answer, if any, is read below
            break
        if size > bounded.LIMITS.image_bytes:
            raise UserError(f"image 'row {row} of {path}' has {size:,} bytes; remove it")
        content = stream.read(size)
        yield f"row {row} of {path}", content
    else:
        _next_size(stream)  # the length -1 after the last image
    given += ask(None)["labels"]


def _next_size(stream: IO[bytes]) -> int:
    content = stream.read(8)
    return struct.unpack("<q", content)[0] if len(content) == 8 else -1


def _class_names(about: dict[str, Any], file: Path) -> list[str] | None:
    """Class names from the hub's metadata; None if there are none.

    `datasets.save_to_disk` stores them in a file beside the tables.
    """
    beside = file.with_name("dataset_info.json")
    texts = [about["about"]]
    if bounded.is_regular(beside):
        most = bounded.LIMITS.header_bytes
        texts.append(bounded.read_file(beside, most, "file").decode("utf-8", "replace"))
    for text in texts:
        try:
            info = json.loads(text)
            names = info.get("info", info)["features"][about["label"]]["names"]
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
            continue
        if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
            return names
    return None
