"""Run records (what was measured, on which device, with which versions) and atomic file writes."""

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
"""Largest record that is read back."""
PACKAGES = ("jaxbd", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def versions() -> dict[str, str]:
    """Installed versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def device() -> str:
    """The default device in words; for a CPU, with its number of cores."""
    import jax

    kind = jax.devices()[0].device_kind
    return (
        f"{kind} ({os.cpu_count()} cores)"
        if jax.default_backend() == "cpu"
        else f"{kind} x{jax.device_count()}"
    )


def plain(value: Any) -> Any:
    """Converts arrays, NumPy scalars, tuples, NamedTuples and paths to JSON types. NaN and
    infinities become None; strings go through `clean_text`."""
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
    """Flushes a file, or a folder's list of names, to disk so that it survives a power failure."""
    try:
        opened = os.open(path, os.O_RDONLY)
    except OSError:
        if path.is_dir():  # Windows cannot open folders, and does not need them synced
            return
        raise
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot sync folders
            raise
    finally:
        os.close(opened)


def sync_tree(folder: pathlib.Path) -> None:
    """Calls `sync` on every file and folder under `folder`, then on `folder` itself."""
    for path in sorted(folder.rglob("*"), reverse=True):  # a folder's contents before the folder
        sync(path)
    sync(folder)


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a temporary sibling of `path`. When the block ends, the sibling is synced to disk and
    renamed to `path`; when the block raises, it is deleted.

    With several processes only the first writes; the others get a throwaway path.
    """
    if not devices.is_first():
        with tempfile.TemporaryDirectory() as folder:
            yield pathlib.Path(folder) / path.name
        return
    path = path.resolve()  # replace the file that a link points to, not the link
    path.parent.mkdir(parents=True, exist_ok=True)
    # the process id keeps parallel runs from writing the same temporary file
    sibling = path.with_name(f".{path.name}.{os.getpid()}.writing")
    try:
        yield sibling
        sync(sibling)
        os.replace(sibling, path)
        sync(path.parent)
    finally:
        sibling.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a text file atomically; characters that UTF-8 cannot encode become "?".

    Raises: UserError when the file cannot be written.
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
    """Writes `value` as JSON, atomically. Raises: UserError when the file cannot be written."""
    write_text(path, json.dumps(plain(value), indent=1, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike) -> Any:
    """Reads a JSON file of at most 64 MiB. Raises: UserError when it is missing, too large, or not
    valid by `limits.parse_json`."""
    path = pathlib.Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist")
    with limits.refusing(path):
        text = limits.read_bounded(path, limits.Limits(), MOST_BYTES)
        return limits.parse_json(text, "the file", limits.Limits(header_bytes=MOST_BYTES))
