"""One checkpoint: a folder of arrays written by Orbax, and a description to verify them.

`checkpoint.json` beside the arrays holds the step, the stage, a digest of the run's settings, the
SHA-256 of each file, and a digest of all of these. It exposes a folder that was renamed, copied
over another or taken from another run, and damaged bytes, which Orbax does not always notice.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import pathlib
import re
import shutil
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from jaxbd import files
from jaxbd.base import UserError

ARRAYS, DESCRIPTION, TEMPORARY = "arrays", "checkpoint.json", "[0-9]*.tmp"
LONGEST_DESCRIPTION = 16 << 20
"""Limit in bytes on reading a description, which normally lists a few dozen files."""


class Unusable(ValueError):
    """A checkpoint is not the requested one, or has changed since it was written. The message is
    one line."""


class Identity(NamedTuple):
    """Identifies a checkpoint: digest of the run's settings, stage, steps made."""

    run_sha256: str
    stage: str
    step: int


def digest(value: Any) -> str:
    """SHA-256 of a value's canonical JSON."""
    text = json.dumps(files.plain(value), sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write_step(path: pathlib.Path, identity: Identity, arrays: dict[str, np.ndarray]) -> None:
    """Saves the arrays as the folder `path`, atomically, and syncs it to disk.

    Raises: UserError when it cannot be written, for example because the disk is full.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for leftover in path.parent.glob(TEMPORARY):  # left by killed runs
            shutil.rmtree(leftover)
        _check_space(path.parent, arrays)
        with _checkpointer() as checkpointer:
            stored = {name: value for name, value in arrays.items() if value.size}
            checkpointer.save(temporary / ARRAYS, stored)
        body = {**identity._asdict(), "files": _hash_files(temporary / ARRAYS)}
        files.write_json(temporary / DESCRIPTION, {**body, "sha256": digest(body)})
        files.sync_tree(temporary)
        if path.exists():  # a damaged checkpoint that `restore` skipped
            shutil.rmtree(path)
        temporary.rename(path)
        files.sync(path.parent)
    # TensorStore's error for a full disk is a ValueError
    except (OSError, ValueError, RuntimeError, UserError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"cannot save a checkpoint in {path.parent}: {reason(error)}; choose a writable folder"
            " with space"
        ) from None
    except BaseException:  # Ctrl-C
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _check_space(folder: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    """Raises OSError when the disk is too full. Checked first, because after one write fails,
    Orbax's other writes still print complaints on stderr."""
    if shutil.disk_usage(folder).free < 2 * sum(value.nbytes for value in arrays.values()):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_step(path: pathlib.Path, identity: Identity) -> dict[str, np.ndarray]:
    """Reads and verifies the arrays of one checkpoint.

    Raises: Unusable when it is not the checkpoint `identity` or a file has changed since it was
      written; also any error that Orbax raises.
    """
    described = _read_description(path / DESCRIPTION)
    for field, wanted in identity._asdict().items():
        if described.get(field) != wanted:
            raise Unusable(_other(field, described.get(field), wanted))
    written, found = described["files"], _hash_files(path / ARRAYS)
    for name in sorted(written.keys() | found.keys()):
        if written.get(name) != found.get(name):
            raise Unusable(f"{ARRAYS}/{name} is not as it was written")
    with _checkpointer() as checkpointer:
        restored = checkpointer.restore(path / ARRAYS)
        return {name: np.asarray(value) for name, value in restored.items()}


def _read_description(path: pathlib.Path) -> dict[str, Any]:
    with path.open("rb") as file:
        text = file.read(LONGEST_DESCRIPTION + 1)
    described = json.loads(text) if len(text) <= LONGEST_DESCRIPTION else None
    if not isinstance(described, dict) or not isinstance(described.get("files"), dict):
        raise Unusable(f"{DESCRIPTION} describes no checkpoint")
    sha256 = described.pop("sha256", None)
    if sha256 != digest(described):
        raise Unusable(f"{DESCRIPTION} is not as it was written")
    return described


def _other(field: str, found: Any, wanted: Any) -> str:
    if field == "run_sha256":
        return "it was saved by a run with other settings"
    return f"it was saved as {field} {json.dumps(found)[:80]}, not {json.dumps(wanted)}"


def _hash_files(folder: pathlib.Path) -> dict[str, str]:
    """SHA-256 of every file under `folder`, by its relative path."""
    hashes = {}
    for path in filter(pathlib.Path.is_file, folder.rglob("*")):
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        hashes[path.relative_to(folder).as_posix()] = found
    return hashes


@contextlib.contextmanager
def _checkpointer() -> Iterator[Any]:
    """Orbax's synchronous checkpointer with logging off, since errors are raised anyway."""
    import jax
    import orbax.checkpoint as ocp

    # Orbax would wait for all processes, but here each reads alone and only the first writes
    own = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=str(own)
    )
    options: dict[str, Any] = {} if jax.process_count() == 1 else {"multiprocessing_options": alone}
    logger = logging.getLogger("absl")
    was, logger.disabled = logger.disabled, True
    try:
        with ocp.Checkpointer(ocp.StandardCheckpointHandler(**options), **options) as checkpointer:
            yield checkpointer
    finally:
        logger.disabled = was


def reason(error: Exception) -> str:
    """The error in one short line."""
    # TensorStore buries the system's error number in a long text
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if code:
        return os.strerror(int(code[1]))
    if getattr(error, "strerror", None):
        return str(error.strerror)  # type: ignore[attr-defined]
    if isinstance(error, UserError | Unusable):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
