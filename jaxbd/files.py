"""Run records: what was measured, on what, with which versions; written whole or not at all."""

import contextlib
import errno
import importlib.metadata
import json
import os
import pathlib
import platform
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxbd import devices, limits
from jaxbd.base import UserError
from jaxbd.limits import clean_text

MOST_BYTES = 64 << 20
"""Size of a record that is read back."""
PACKAGES = ("jaxbd", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def versions() -> dict[str, str]:
    """Installed versions of what results depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def device() -> str:
    """The default device in words, with the number of cores where it is a CPU."""
    import jax

    kind = jax.devices()[0].device_kind
    return (
        f"{kind} ({os.cpu_count()} cores)"
        if jax.default_backend() == "cpu"
        else f"{kind} x{jax.device_count()}"
    )


def plain(value: Any) -> Any:
    """Arrays, NumPy scalars, tuples and NamedTuples as JSON types; NaN and infinities as None; text
    without what a terminal would obey."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {clean_text(str(k)): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, bool | int) or value is None:
        return value
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if isinstance(value, pathlib.Path):
        return clean_text(str(value))
    return plain(np.asarray(value).tolist())


def sync(path: pathlib.Path) -> None:
    """Waits until a file, or the names in a folder, are on disk and survive a power failure."""
    try:
        opened = os.open(path, os.O_RDONLY)
    except OSError:
        if path.is_dir():  # Windows opens no folders, and needs no sync of them
            return
        raise
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno != errno.EINVAL:  # file systems that sync no folders
            raise
    finally:
        os.close(opened)


def sync_tree(folder: pathlib.Path) -> None:
    """`sync` of every file and folder under `folder`, and of itself last."""
    for path in sorted(folder.rglob("*"), reverse=True):  # what a folder holds before the folder
        sync(path)
    sync(folder)


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a temporary sibling of `path` that takes its place when the block ends, or vanishes
    when it raises. When it returns, the file is on disk.

    Of several processes the first alone writes; to the others it yields a file that vanishes.
    """
    if not devices.is_first():
        with tempfile.TemporaryDirectory() as folder:
            yield pathlib.Path(folder) / path.name
        return
    path = path.resolve()  # a link stays, and the file that it names is replaced
    path.parent.mkdir(parents=True, exist_ok=True)
    sibling = path.with_name(f".{path.name}.{os.getpid()}.writing")
    try:
        yield sibling
        sync(sibling)
        os.replace(sibling, path)
        sync(path.parent)
    finally:
        sibling.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a text file, whole or not at all; characters that UTF-8 cannot hold become "?".

    Raises: UserError when the folder cannot be written.
    """
    path = pathlib.Path(path)
    try:
        with replacing(path) as sibling:
            sibling.write_bytes(text.encode(errors="replace"))
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}; choose a writable folder with space"
        ) from None


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes `value` as JSON, whole or not at all. Raises: UserError when the folder cannot be
    written."""
    write_text(path, json.dumps(plain(value), indent=1, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike) -> Any:
    """A JSON file of at most 64 MB. Raises: UserError when it is missing or not JSON that all
    readers understand alike."""
    path = pathlib.Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist")
    with limits.refusing(path):
        text = limits.read_bounded(path, limits.Limits(), MOST_BYTES)
        return limits.parse_json(text, "the file", limits.Limits(header_bytes=MOST_BYTES))
