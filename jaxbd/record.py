"""Run records: what was measured, on what, with which versions; written whole or not at all."""

import importlib.metadata
import json
import os
import pathlib
import platform
import tempfile
from typing import Any

import numpy as np

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


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes `value` as JSON under a temporary name beside `path`, then renames.

    Raises: UserError when the folder cannot be written.
    """
    path = pathlib.Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
        try:
            with os.fdopen(handle, "w") as file:
                json.dump(plain(value), file, indent=1, allow_nan=False)
                file.write("\n")
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose a writable folder with space") from None


def read_json(path: str | os.PathLike) -> Any:
    """A JSON file. Raises: UserError when it is missing or not JSON."""
    try:
        return json.loads(pathlib.Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from None
