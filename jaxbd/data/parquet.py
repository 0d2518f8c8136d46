"""Parquet tables in the layout of dataset hubs: encoded images, whole-number labels, class names in the metadata."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxbd.base import Dataset, UserError
from jaxbd.data import pack

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "fine_label")
_SPLIT_WORDS = ("train", "test", "validation", "valid", "val")


def load(
    path: str | Path,
    *,
    split: str = "test",
    image_shape: pack.Shape | None = None,
    channels: int | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Reads one parquet file (whatever its split), or the shards of `split` in a folder, in the order of names.

    Columns: `image` or `img`, a struct of `bytes` and `path` (or plain bytes); `label` or `fine_label`, int.

    Args:
      image_shape, channels: see `pack.decode`.
      limit: at most so many images, drawn with `seed` before anything is decoded.
    Raises: UserError when files, the split or a column is missing, or on damaged files and bad images.
    """
    tables = [_open(file) for file in shards(Path(path), split)]
    total = sum(table.metadata.num_rows for table in tables)
    rows = pack.chosen_rows(total, limit, seed)
    labels: list[np.ndarray] = []
    images = pack.decode(_images(path, tables, rows, labels), len(rows), image_shape=image_shape, channels=channels)
    names = _class_names(tables[0], _column(path, tables[0], LABEL_COLUMNS))
    return pack.dataset(images, np.concatenate([np.zeros(0, np.int64), *labels]), names, str(path))


def shards(path: Path, split: str) -> list[Path]:
    """The parquet files of `split`: those named after it, or all where no file is named after any split."""
    if path.is_file():
        return [path]
    if not path.exists():
        raise UserError(f"data {path} does not exist; check the path")
    files = sorted(path.glob("*.parquet")) or sorted(path.glob("*/*.parquet"))
    if not files:
        raise UserError(f"data {path} has no parquet files; check the path")
    named = {file: word for file in files for word in (re.split(r"[-_.]", file.name)[0],) if word in _SPLIT_WORDS}
    chosen = [file for file in files if named.get(file) == split] if named else files
    if not chosen:
        has = ", ".join(sorted(set(named.values())))
        raise UserError(f"data {path} has no split {split!r}; it has {has}")
    return chosen


def _open(file: Path) -> Any:
    """The file's `pyarrow.parquet.ParquetFile`; only its footer is read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
        _ = table.schema_arrow.names  # decoded on first use: damaged names show here
        return table
    except (pa.ArrowException, OSError, ValueError):
        raise UserError(f"data {file} is not a readable parquet file; fetch it again") from None


def _column(path: str | Path, table: Any, candidates: tuple[str, ...]) -> str:
    names = table.schema_arrow.names
    for name in candidates:
        if name in names:
            return name
    wanted = " or ".join(candidates)
    raise UserError(f"data {path} has no column {wanted}; it has {', '.join(map(repr, names)) or 'none'}; rename one")


def _images(path: str | Path, tables: list[Any], rows: np.ndarray, labels: list[np.ndarray]) -> Iterator[Any]:
    """Yields (name, bytes) of the chosen `rows`, one row group in memory at a time; appends their labels [n]."""
    start = 0
    for table in tables:
        for group in range(table.num_row_groups):
            stop = start + table.metadata.row_group(group).num_rows
            inside = rows[(rows >= start) & (rows < stop)]
            if len(inside):
                contents, numbers = _read_group(path, table, group, inside - start)
                labels.append(numbers)
                yield from ((f"row {row} of {path}", content) for row, content in zip(inside, contents, strict=True))
            start = stop


def _read_group(path: str | Path, table: Any, group: int, rows: np.ndarray) -> tuple[list[bytes], np.ndarray]:
    """Encoded images and labels of `rows` in one row group."""
    import pyarrow as pa
    import pyarrow.compute as pc

    image, label = _column(path, table, IMAGE_COLUMNS), _column(path, table, LABEL_COLUMNS)
    try:
        read = table.read_row_group(group, columns=[image, label]).take(pa.array(rows))
    except (pa.ArrowException, OSError, ValueError):
        raise UserError(f"data {path} is a damaged parquet file; fetch it again") from None
    contents, numbers = read[image].combine_chunks(), read[label].combine_chunks()
    if pa.types.is_struct(contents.type) and contents.type.get_field_index("bytes") >= 0:
        contents = pc.struct_field(contents, "bytes")
    if not (pa.types.is_binary(contents.type) or pa.types.is_large_binary(contents.type)):
        raise UserError(f"data {path}: column {image!r} is {contents.type}; it must hold encoded images as bytes")
    if not pa.types.is_integer(numbers.type):
        raise UserError(f"data {path}: column {label!r} is {numbers.type}; it must hold whole class numbers")
    if contents.null_count or numbers.null_count:
        raise UserError(f"data {path}: some rows lack the image's bytes or the label; embed them or drop the rows")
    return contents.to_pylist(), numbers.to_numpy(zero_copy_only=False)


def _class_names(table: Any, label: str) -> list[str] | None:
    """Names of the label's classes from the hub's metadata, None where there are none."""
    try:
        info = json.loads((table.schema_arrow.metadata or {})[b"huggingface"])
        names = info["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None
