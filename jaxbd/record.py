"""Run records: what was measured, on what, with which versions; written whole or not at all."""

import contextlib
import importlib.metadata
import json
import os
import pathlib
import platform
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxbd import devices
from jaxbd.base import UserError

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
    return f"{kind} ({os.cpu_count()} cores)" if jax.default_backend() == "cpu" else f"{kind} x{jax.device_count()}"


def plain(value: Any) -> Any:
    """Arrays, NumPy scalars, tuples and NamedTuples as JSON types; NaN and infinities as None."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, bool | str | int) or value is None:
        return value
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if isinstance(value, pathlib.Path):
        return str(value)
    return plain(np.asarray(value).tolist())


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a temporary sibling of `path` that takes its place when the block ends, or vanishes when it raises.

    Of several processes the first alone writes; to the others it yields a file that vanishes.
    """
    if not devices.is_first():
        with tempfile.TemporaryDirectory() as folder:
            yield pathlib.Path(folder) / path.name
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    sibling = path.with_name(f".{path.name}.{os.getpid()}.writing")
    try:
        yield sibling
        os.replace(sibling, path)
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
        raise UserError(f"cannot write {path}: {error.strerror}; choose a writable folder with space") from None


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes `value` as JSON, whole or not at all. Raises: UserError when the folder cannot be written."""
    write_text(path, json.dumps(plain(value), indent=1, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike) -> Any:
    """A JSON file. Raises: UserError when it is missing or not JSON."""
    try:
        return json.loads(pathlib.Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from None
