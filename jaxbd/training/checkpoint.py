"""Save, restore and resume a run, so that a killed run continues bit for bit.

A checkpoint folder holds `config.json`, which records everything the run depends on, and one folder
per stage. A stage's folder holds one folder per saved step (see `step_folder`); only the newest two
stay. A checkpoint is written under a temporary name, synced to disk and renamed, so a run killed
while writing leaves the older checkpoints intact. Nothing read from the folder is executed: it
holds JSON, and arrays read through TensorStore.
"""

import glob
import json
import os
import pathlib
import re
import shutil
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxbd import devices, files
from jaxbd.base import ArrayTree, UserError
from jaxbd.training import step_folder, tree_arrays
from jaxbd.training.step_folder import Identity

KEEP = 2
"""Checkpoints to keep per stage; older ones are deleted."""
SCHEMA = "jaxbd/2/checkpoint"
CONFIG, DISCARDED = "config.json", ".discarded"
OTHERS, CHOOSE = "belongs to another run", "choose another folder or delete it"


class Saved(NamedTuple):
    """A saved point that a run can resume from.

    Attributes:
      state: after `step` steps.
      infos: NumPy arrays [step, …], the method's `Info` of every step so far.
      step: number of steps made.
    """

    state: ArrayTree
    infos: ArrayTree
    step: int


class Writer:
    """Writes the checkpoints of one stage into `folder/stage`; the first write makes the folder.

    Attributes:
      step: step of the last checkpoint written or restored.
    """

    def __init__(
        self,
        folder: str | pathlib.Path,
        config: dict[str, Any],
        like: ArrayTree,
        *,
        restored: Saved | None = None,
        stage: str | None = None,
    ):
        """`like` is the run's first state, or its shapes; `restored` is the result of `restore`.

        Checkpoints past the restored one were refused by `restore`; the next write deletes them.

        Raises: UserError when the folder belongs to another run, or when it has checkpoints of this
          run and `restored` is None.
        """
        self._folder, self._config = pathlib.Path(folder).absolute(), config
        self._stage, self._own = stage or "", self._folder / (stage or "")
        self._run_sha256 = step_folder.digest(config)
        self._signature = tree_arrays.signature(like)
        if _is_of_run(self._folder, config) and restored is None and _steps(self._own):
            raise UserError(
                f"{self._own} has checkpoints of this run; resume from them or delete it to start"
                " over"
            )
        self.step = restored.step if restored else 0
        self._written_at = time.perf_counter()

    def seconds_since(self) -> float:
        """Seconds since the last write, or since the writer was made."""
        return time.perf_counter() - self._written_at

    def write(self, saved: Saved) -> None:
        """Writes a checkpoint atomically.

        Raises: UserError when it cannot be written; ValueError when the state's structure, shapes
          or types differ from those of the run.
        """
        if tree_arrays.signature(saved.state) != self._signature:
            raise ValueError("this state is not the run's whole state")
        arrays = {
            **tree_arrays.to_arrays("state", saved.state),
            **tree_arrays.to_arrays("infos", saved.infos),
        }
        if devices.is_first():
            self._write(saved.step, arrays)
        self.step, self._written_at = saved.step, time.perf_counter()

    def _write(self, step: int, arrays: dict[str, np.ndarray]) -> None:
        if not (self._folder / CONFIG).exists():
            files.write_json(self._folder / CONFIG, {"schema": SCHEMA, "run": self._config})
        identity = Identity(self._run_sha256, self._stage, step)
        step_folder.write_step(self._own / str(step), identity, arrays)
        steps = _steps(self._own)
        refused = [other for other in steps if other > step]
        older = [other for other in steps if other <= step]
        for other in (*refused, *older[:-KEEP]):
            shutil.rmtree(self._own / str(other), ignore_errors=True)


def restore(
    folder: str | pathlib.Path,
    config: dict[str, Any],
    like: ArrayTree,
    info: type,
    warn: Callable[[str], None] = warnings.warn,
    stage: str | None = None,
) -> Saved | None:
    """Returns the newest undamaged checkpoint in `folder`; None when the folder is absent or has no
    checkpoint yet.

    Args:
      config: everything the run depends on, as JSON types or arrays: method, its Config, seed,
        SHA-256 of the model, `files.versions()`. A folder with a different config is refused.
      like: a state or its shapes (`jax.eval_shape`): gives structure, shapes, types and placement.
      info: the method's `Info`, a NamedTuple class.
      warn: called with one line for each damaged checkpoint.
      stage: name of the stage's folder; None for a run without stages.
    Raises: UserError when the folder belongs to another run (the message names the first field that
      differs), is not a checkpoint folder, or holds only damaged checkpoints.
    """
    folder = pathlib.Path(folder).absolute()
    if not _is_of_run(folder, config):
        return None
    own, run_sha256 = folder / (stage or ""), step_folder.digest(config)
    steps = _steps(own)
    for step in reversed(steps):
        try:
            identity = Identity(run_sha256, stage or "", step)
            arrays = step_folder.read_step(own / str(step), identity)
            infos = tree_arrays.to_infos(arrays)
            _check_lengths(infos, step)
        except Exception as error:  # Orbax raises unrelated types on damaged bytes
            why = step_folder.reason(error)
            warn(f"checkpoint {own / str(step)} is damaged and was not used: {why}")
            continue
        if infos.keys() != set(info._fields):  # type: ignore[attr-defined]
            raise UserError(f"{own} {OTHERS}: its infos are {', '.join(sorted(infos))}; {CHOOSE}")
        try:
            return Saved(tree_arrays.to_state(like, arrays), info(**infos), step)
        except tree_arrays.Mismatch as error:
            raise UserError(f"{own} {OTHERS}: {error}; {CHOOSE}") from None
    if steps:
        raise UserError(
            f"{own}: every checkpoint is damaged (steps {steps}); delete the folder to start over"
        )
    return None


def _check_lengths(infos: dict[str, ArrayTree], step: int) -> None:
    """Raises Unusable unless `infos` has one entry for each of `step` steps."""
    lengths = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(infos)}
    if lengths - {(step,)}:
        raise step_folder.Unusable(f"its infos are not those of {step} steps")


def is_started(folder: str | pathlib.Path) -> bool:
    """Whether the folder has checkpoints of any run and stage.

    Raises: UserError when it is not a checkpoint folder.
    """
    folder = pathlib.Path(folder).absolute()
    return _config(folder) is not None and any(
        map(_steps, (folder, *filter(pathlib.Path.is_dir, folder.iterdir())))
    )


def discard(folder: str | pathlib.Path) -> None:
    """Deletes a checkpoint folder of any run, if it exists. A process killed meanwhile does not
    leave half a folder.

    Sync the run's output to disk first, see `files.sync`: until then the checkpoints are the only
    safe copy.

    Raises: UserError when the folder is not a checkpoint folder, or cannot be deleted.
    """
    folder = pathlib.Path(folder).absolute()
    if not devices.is_first():  # the first process may already be deleting the files
        return
    _config(folder)
    try:
        # renamed first: a rename is atomic, and the next call removes any leftovers
        if folder.exists():
            folder.rename(folder.with_name(f".{folder.name}.{os.getpid()}{DISCARDED}"))
            files.sync(folder.parent)
        for leftover in folder.parent.glob(f".{glob.escape(folder.name)}.*{DISCARDED}"):
            shutil.rmtree(leftover)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be deleted: {error.strerror}; delete it by hand"
        ) from None


def _config(folder: pathlib.Path) -> dict[str, Any] | None:
    """Content of the folder's `config.json`; None when the folder is absent or empty.

    Raises: UserError when it is not a checkpoint folder.
    """
    try:
        # ignores temporary files of runs that were killed while writing config.json
        entries = [
            entry.name for entry in folder.iterdir() if not entry.match(f".{CONFIG}.*.writing")
        ]
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(
            f"{folder} cannot be read: {error.strerror}; choose another folder"
        ) from None
    if not entries:
        return None
    found = files.read_json(folder / CONFIG) if CONFIG in entries else None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise UserError(f"{folder} is not a checkpoint folder; choose an empty or a new one")
    return found


def _is_of_run(folder: pathlib.Path, config: dict[str, Any]) -> bool:
    """Whether the folder belongs to the run `config`; False when it is absent or empty.

    Raises: UserError when it belongs to another run.
    """
    found = _config(folder)
    if found is None:
        return False
    # through JSON, so that tuples and arrays compare equal to what was stored
    difference = _difference(found.get("run"), json.loads(json.dumps(files.plain(config))))
    if difference:
        raise UserError(f"{folder} {OTHERS}: {difference}; {CHOOSE}")
    return True


def _difference(theirs: Any, ours: Any, field: str = "config") -> str | None:
    """Names the first field in which two JSON values differ, with both values; None when equal."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for name in sorted(theirs.keys() | ours.keys()):
            found = _difference(theirs.get(name), ours.get(name), f"{field}.{name}")
            if found:
                return found
        return None
    if theirs == ours:
        return None
    there, here = (json.dumps(value)[:80] for value in (theirs, ours))
    return f"{field} is {there} there and {here} here"


def _steps(folder: pathlib.Path) -> list[int]:
    """Steps that have a folder, ascending."""
    entries = folder.iterdir() if folder.is_dir() else ()
    return sorted(int(entry.name) for entry in entries if re.fullmatch("[1-9][0-9]*", entry.name))
