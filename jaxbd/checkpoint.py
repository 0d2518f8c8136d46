"""Save, restore and resume a run with Orbax, so that a killed run continues bit for bit.

A checkpoint folder holds `config.json`, what the run depends on, and beside it one folder per saved step, named by the
step; the newest two are kept. A run of several stages has a folder for each of them, which holds its steps. In a step's
folder lie named arrays as Orbax writes them, those of the state and of the infos of all steps so far, and the SHA-256
of each file, because the format does not notice every damaged byte. It is written under a temporary name and renamed,
so a run killed while writing leaves the older checkpoints as they were. Nothing read from the folder is executed: it is
JSON, and arrays through TensorStore.
"""

import contextlib
import errno
import glob
import hashlib
import json
import logging
import os
import pathlib
import re
import shutil
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd import devices, record
from jaxbd.base import ArrayTree, UserError

KEEP = 2
SCHEMA = "jaxbd/1/checkpoint"
CONFIG, ARRAYS, HASHES, TEMPORARY = "config.json", "arrays", "sha256.json", "[0-9]*.tmp"
DISCARDED = ".discarded"
OTHERS, CHOOSE = "belongs to another run", "choose another folder or delete it"

OnChunk = Callable[[int, ArrayTree, ArrayTree], None]
Also = Callable[[float], bool]
"""(seconds since the last save, or since the start) -> whether to save although it is not yet time by steps."""


class Saved(NamedTuple):
    """What a run needs to go on.

    Attributes:
      state: as it was after `step` steps.
      infos: NumPy arrays [step, …], the method's `Info` of every step so far.
      step: how many steps were done.
    """

    state: ArrayTree
    infos: ArrayTree
    step: int


def resume(
    folder: str | pathlib.Path,
    config: dict[str, Any],
    state: ArrayTree,
    fit: Callable[[ArrayTree, int, OnChunk], tuple[ArrayTree, ArrayTree, Any]],
    *,
    info: type,
    num_steps: int,
    every: int,
    also: Also = lambda seconds: False,
    warn: Callable[[str], None] = warnings.warn,
    stage: str | None = None,
) -> tuple[ArrayTree, ArrayTree, Any]:
    """Runs `fit` from the newest checkpoint in `folder`, or from `state` where there is none, and saves on the way.

    State and infos equal those of a run that was never interrupted, bit for bit, as long as chunks are of one size
    and the machine is the same. A run that had finished repeats only what came after its last checkpoint.

    Args:
      folder: of this run alone; made when absent.
      config: everything the run depends on as JSON types or arrays: method, its Config, seed, SHA-256 of the model,
        `record.versions()`. A folder with another one is refused.
      state: fresh; may be donated by `fit`.
      fit: (state, steps left, on_chunk) -> (state, infos, seconds), such as
        `lambda state, left, on_chunk: loop.fit(key, step, draw, data, state, num_steps=left, on_chunk=on_chunk)`.
      info: the method's `Info`, a NamedTuple class.
      num_steps: of the whole run.
      every: saves at the first end of a chunk at which so many steps were done since the last save.
      also: asked at every other end of a chunk whether to save there too, such as before a stop.
      warn: told in one line of each checkpoint that was damaged and not used.
      stage: name of a folder for this part of the run, which has other parts.
    Returns: the last state, infos [num_steps, …] as NumPy, and the seconds that `fit` returned.
    Raises: UserError as `restore` and `make` do.
    """
    saved = restore(folder, config, state, info, warn, stage)
    step = str(saved.step if saved else 0)
    devices.check_same("checkpoint", step.encode(), f"{folder} must lie on a disk that all machines share")
    if saved and saved.step > num_steps:
        raise UserError(f"{folder} is at step {saved.step}, past the {num_steps} asked for; choose another folder")
    on_chunk = make(folder, config, every, state, saved, also, stage)
    if saved is None:
        return fit(state, num_steps, on_chunk)
    state, infos, seconds = fit(saved.state, num_steps - saved.step, on_chunk)
    return state, saved.infos if infos is None else _joined([saved.infos, infos]), seconds


def make(
    folder: str | pathlib.Path,
    config: dict[str, Any],
    every: int,
    like: ArrayTree,
    saved: Saved | None = None,
    also: Also = lambda seconds: False,
    stage: str | None = None,
) -> OnChunk:
    """A callback for `loop.run` and `sweep.fit` that saves every `every` steps; makes the folder when it first does.

    Args:
      like: the state the run starts from, or its shapes (`jax.eval_shape`).
      saved: what `restore` returned. Checkpoints past it, which it refused, are removed as the run gets there.
      also, stage: see `resume`.
    Raises: UserError when the folder is another run's, cannot be written, or has checkpoints and `saved` is None. The
      callback raises it when a checkpoint cannot be written, and ValueError on a state unlike `like`.
    """
    if every < 1:
        raise UserError(f"checkpoints: every is {every}; give at least 1 step")
    folder = pathlib.Path(folder).absolute()
    own = folder / (stage or "")
    if _is_of_run(folder, config) and saved is None and _steps(own):
        raise UserError(f"{own} has checkpoints of this run; resume from them or delete it to start over")
    done_before, saved_at = saved.step if saved else 0, time.perf_counter()
    wanted = _signature(like)
    chunks, last = [saved.infos] if saved else [], done_before

    def on_chunk(done: int, state: ArrayTree, infos: ArrayTree) -> None:
        nonlocal last, saved_at
        if _signature(state) != wanted:  # a sweep's host loop over cells hands over one cell at a time
            raise ValueError('this state is not the run\'s whole state; sweeps can be saved with how="vmap" or "map"')
        chunks.append(infos)
        if done_before + done - last >= every or also(time.perf_counter() - saved_at):
            last = done_before + done
            chunks[:] = [_joined(chunks)]
            if not (folder / CONFIG).exists():
                record.write_json(folder / CONFIG, {"schema": SCHEMA, "run": config})
            _write(own, last, {**_named("state", state), **_named("infos", chunks[0])})
            saved_at = time.perf_counter()

    return on_chunk


def restore(
    folder: str | pathlib.Path,
    config: dict[str, Any],
    like: ArrayTree,
    info: type,
    warn: Callable[[str], None] = warnings.warn,
    stage: str | None = None,
) -> Saved | None:
    """The newest checkpoint in `folder` that is whole; None when the folder is absent or has none yet.

    Args:
      config: of the run, see `resume`.
      like: a state or its shapes (`jax.eval_shape`): gives structure, shapes, types and placement.
      info: the method's `Info`, a NamedTuple class.
      warn: told in one line of each checkpoint that was damaged and not used.
      stage: see `resume`.
    Raises: UserError when the folder belongs to another run or is no checkpoint folder, naming what differs, and when
      every checkpoint in it is damaged.
    """
    folder = pathlib.Path(folder).absolute()
    if not _is_of_run(folder, config):
        return None
    own = folder / (stage or "")
    steps = _steps(own)
    for step in reversed(steps):
        try:
            arrays = _read(own / str(step))
        except Exception as error:  # what damaged bytes make Orbax raise has no common type
            warn(f"checkpoint {own / str(step)} is damaged and was not used: {_reason(error)}")
            continue
        infos = _infos(arrays)
        if infos.keys() != set(info._fields):
            raise UserError(f"{own} {OTHERS}: its infos are {', '.join(sorted(infos))}; {CHOOSE}")
        return Saved(_filled(like, arrays, own), info(**infos), step)
    if steps:
        raise UserError(f"{own}: every checkpoint is damaged (steps {steps}); delete the folder to start over")
    return None


def is_started(folder: str | pathlib.Path) -> bool:
    """Whether the folder has checkpoints, of whatever run and stage.

    Raises: UserError when it is no checkpoint folder.
    """
    folder = pathlib.Path(folder).absolute()
    return _config(folder) is not None and any(map(_steps, (folder, *filter(pathlib.Path.is_dir, folder.iterdir()))))


def discard(folder: str | pathlib.Path) -> None:
    """Deletes a checkpoint folder, of whatever run; there may be none. One that is killed at it leaves no half of it.

    Raises: UserError when the folder is something else, or cannot be deleted.
    """
    folder = pathlib.Path(folder).absolute()
    if not devices.is_first():  # the first may be deleting what another would look at
        return
    _config(folder)
    try:
        if folder.exists():
            folder.rename(folder.with_name(f".{folder.name}.{os.getpid()}{DISCARDED}"))
        for left in folder.parent.glob(f".{glob.escape(folder.name)}.*{DISCARDED}"):
            shutil.rmtree(left)
    except OSError as error:
        raise UserError(f"{folder} cannot be deleted: {error.strerror}; delete it by hand") from None


def _config(folder: pathlib.Path) -> dict[str, Any] | None:
    """What the folder's `config.json` holds; None when the folder is absent or empty, UserError when it is others'."""
    try:
        entries = [entry.name for entry in folder.iterdir() if not entry.match(f".{CONFIG}.*.writing")]
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}; choose another folder") from None
    if not entries:
        return None
    found = record.read_json(folder / CONFIG) if CONFIG in entries else None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise UserError(f"{folder} is not a checkpoint folder; choose an empty or a new one")
    return found


def _is_of_run(folder: pathlib.Path, config: dict[str, Any]) -> bool:
    """Whether the folder is one of the run `config`; False when it is absent or empty, UserError when it is others'."""
    found = _config(folder)
    if found is None:
        return False
    difference = _difference(found.get("run"), json.loads(json.dumps(record.plain(config))))
    if difference:
        raise UserError(f"{folder} {OTHERS}: {difference}; {CHOOSE}")
    return True


def _difference(theirs: Any, ours: Any, field: str = "config") -> str | None:
    """The first field in which two JSON values differ, and how."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        pairs = ((name, theirs.get(name), ours.get(name)) for name in sorted(theirs.keys() | ours.keys()))
        return next(filter(None, (_difference(a, b, f"{field}.{name}") for name, a, b in pairs)), None)
    shown = [json.dumps(value)[:80] for value in (theirs, ours)]
    return None if theirs == ours else f"{field} is {shown[0]} there and {shown[1]} here"


def _steps(folder: pathlib.Path) -> list[int]:
    """Steps that have a folder, in order."""
    entries = folder.iterdir() if folder.is_dir() else ()
    return sorted(int(entry.name) for entry in entries if re.fullmatch("[1-9][0-9]*", entry.name))


def _infos(arrays: dict[str, np.ndarray]) -> dict[str, ArrayTree]:
    """Infos by field; those of a field that is a dictionary by their names in it."""
    infos: dict[str, ArrayTree] = {}
    for name, value in arrays.items():
        kind, _, rest = name.partition("/")
        field, _, key = rest.partition("/")
        if kind == "infos" and key:
            infos.setdefault(field, {})[key] = value
        elif kind == "infos":
            infos[field] = value
    return infos


def _named(prefix: str, tree: ArrayTree) -> dict[str, np.ndarray]:
    """Leaves as NumPy arrays by path ("state/variables/params/head/bias"); typed keys as their data."""
    leaves = map(np.asarray, jax.device_get(jax.tree.leaves(_without_keys(tree))))
    return dict(zip(_names(prefix, tree), leaves, strict=True))


def _names(prefix: str, tree: ArrayTree) -> list[str]:
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    return [f"{prefix}/{jax.tree_util.keystr(path, simple=True, separator='/')}" for path in paths]


def _filled(like: ArrayTree, arrays: dict[str, np.ndarray], folder: pathlib.Path) -> ArrayTree:
    """`like` with its leaves replaced by the arrays of their names, placed where `like` was placed on purpose."""
    structure, shapes = _signature(like)
    wanted = dict(zip(_names("state", like), shapes, strict=True))
    # arrays of size zero are not stored: their shape says it all
    arrays = {**{name: np.zeros(*kind) for name, kind in wanted.items() if 0 in kind[0]}, **arrays}
    found = {name: (value.shape, str(value.dtype)) for name, value in arrays.items() if name.startswith("state/")}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            kinds = [" of ".join(map(str, kind[name][::-1])) if name in kind else "absent" for kind in (found, wanted)]
            raise UserError(f"{folder} {OTHERS}: {name} is {kinds[0]} there and {kinds[1]} here; {CHOOSE}")
    return structure.unflatten(map(_placed, (arrays[name] for name in wanted), jax.tree.leaves(like)))


def _placed(value: np.ndarray, like: Any) -> Any:
    if isinstance(like, np.ndarray):  # kept in the host's memory
        return value
    where = like.sharding if getattr(like, "committed", False) else None
    if _is_key(like):
        value = jax.random.wrap_key_data(value, impl=jax.random.key_impl(jnp.zeros((), like.dtype)))
    return jax.device_put(value, where)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key)


def _without_keys(tree: ArrayTree) -> ArrayTree:
    """Typed keys replaced by their data."""
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf, tree)


def _signature(tree: ArrayTree) -> tuple[Any, list[tuple[tuple[int, ...], str]]]:
    """Structure, and shape and type of every leaf as stored."""
    leaves, structure = jax.tree.flatten(jax.eval_shape(_without_keys, tree))
    return structure, [(leaf.shape, str(leaf.dtype)) for leaf in leaves]


def _joined(chunks: list[ArrayTree]) -> ArrayTree:
    """Infos [steps, …] of several chunks as one."""
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *chunks)


@contextlib.contextmanager
def _checkpointer():
    """Orbax's synchronous checkpointer, its logger silent: what goes wrong is raised."""
    import orbax.checkpoint as ocp

    # by itself Orbax waits for all processes; here each reads on its own and the first alone writes
    own = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=str(own)
    )
    options = {} if jax.process_count() == 1 else {"multiprocessing_options": alone}
    logger = logging.getLogger("absl")
    was, logger.disabled = logger.disabled, True
    try:
        with ocp.Checkpointer(ocp.StandardCheckpointHandler(**options), **options) as checkpointer:
            yield checkpointer
    finally:
        logger.disabled = was


def _write(folder: pathlib.Path, step: int, arrays: dict[str, np.ndarray]) -> None:
    """Saves the arrays as the checkpoint of `step`, then removes all but the newest.

    Before it, what killed runs left goes, and checkpoints that are not older: `restore` refused them.
    """
    temporary = folder / f"{step}.tmp"
    if not devices.is_first():
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        refused = [folder / str(other) for other in _steps(folder) if other >= step]
        for left in (*folder.glob(TEMPORARY), *refused):
            shutil.rmtree(left)
        # asked beforehand, because a write that fails half-way leaves Orbax's other writes complaining on stderr
        if shutil.disk_usage(folder).free < 2 * sum(value.nbytes for value in arrays.values()):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with _checkpointer() as checkpointer:
            checkpointer.save(temporary / ARRAYS, {name: value for name, value in arrays.items() if value.size})
        record.write_json(temporary / HASHES, _hashes(temporary / ARRAYS))
        temporary.rename(folder / str(step))
        for old in _steps(folder)[:-KEEP]:
            shutil.rmtree(folder / str(old))
    except (OSError, ValueError, RuntimeError) as error:  # TensorStore's for a full disk is a ValueError
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"cannot save a checkpoint in {folder}: {_reason(error)}; choose a writable folder with space"
        ) from None


def _read(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of one checkpoint. Raises: ValueError when a file is not as it was written, and what Orbax raises."""
    written, found = json.loads((path / HASHES).read_text()), _hashes(path / ARRAYS)
    for name in sorted(written.keys() | found.keys()):
        if written.get(name) != found.get(name):
            raise ValueError(f"{ARRAYS}/{name} is not as it was written")
    with _checkpointer() as checkpointer:
        return {name: np.asarray(value) for name, value in checkpointer.restore(path / ARRAYS).items()}


def _hashes(folder: pathlib.Path) -> dict[str, str]:
    """SHA-256 of every file under `folder` by its path in it."""
    hashes = {}
    for path in filter(pathlib.Path.is_file, folder.rglob("*")):
        with path.open("rb") as file:
            hashes[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def _reason(error: Exception) -> str:
    """What went wrong, in one short line; TensorStore states the system's reason as a number inside a long text."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if code or getattr(error, "strerror", None):
        return os.strerror(int(code[1])) if code else error.strerror
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
