"""Manners of jobs that take hours: checkpoints, `--resume`, metrics as JSON lines, and a clean end on a signal.

A verb adds `Flags` to its own, calls `prepare` before any work, `run` for the work, and `finish` once the output is
written. Beside an output `OUT` lie `OUT.run`, the checkpoints of an unfinished run, and `OUT.metrics.jsonl`.
"""

import dataclasses
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jaxbd import checkpoint, record
from jaxbd.base import ArrayTree, UserError
from jaxbd.cli import show, signals
from jaxbd.loop import Seconds

LONGEST = 600.0
"""Seconds after which a checkpoint is written even though fewer steps were done than asked for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """How a run may be stopped.

    Attributes:
      resume: go on with the run in OUT.run; on the same kind of machine the result is the same bit for bit.
      save_every: steps between two checkpoints; there is also one after ten minutes without any.
    """

    resume: bool = False
    save_every: int = 500

    def __post_init__(self):
        if self.save_every < 1:
            raise UserError(f"--save-every {self.save_every} is no number of steps; give at least 1")


class Files(NamedTuple):
    """Folder of the checkpoints, file of the metrics."""

    checkpoints: pathlib.Path
    metrics: pathlib.Path


class Ran(NamedTuple):
    """What a run gave.

    Attributes:
      result, infos, seconds: what `fit` returned; infos of every step, seconds of this process alone.
      resumed: {"step", "seconds"} with which this process began; None when it did all of the run.
    """

    result: ArrayTree
    infos: Any
    seconds: Seconds
    resumed: dict[str, float] | None


def prepare(out: pathlib.Path, flags: Flags) -> Files:
    """Finds out whether a run for `out` may start or go on; changes nothing.

    Raises: UserError when there is an unfinished run and no --resume, or --resume and only a finished one.
    """
    out = out.expanduser().absolute()
    files = Files(*(out.with_name(out.name + ending) for ending in (".run", ".metrics.jsonl")))
    started = checkpoint.is_started(files.checkpoints)
    if started and not flags.resume:
        raise UserError(f"{files.checkpoints} is an unfinished run; give --resume to go on, or delete it to start over")
    if flags.resume and not started and out.exists():
        raise UserError(f"nothing to resume: {out} is there, without an unfinished run beside it; leave --resume out")
    if flags.resume and not started:
        show.note(f"nothing to resume at {files.checkpoints}: this run starts at the beginning")
    return files


def run(
    files: Files,
    flags: Flags,
    config: dict[str, Any],
    state: ArrayTree,
    fit: Callable[[ArrayTree, int, checkpoint.OnChunk], tuple[ArrayTree, ArrayTree, Seconds]],
    *,
    info: type,
    num_steps: int,
) -> Ran:
    """Runs `fit` from `state` or from the newest checkpoint; saves and writes metrics on the way.

    Args:
      config, fit, info: see `checkpoint.resume`.
    Raises: signals.Stopped at the first end of a chunk after a signal, once a checkpoint is saved; UserError as
      `checkpoint.resume` does, and when the metrics cannot be written.
    """
    stopping, resumed = None, None

    def watched(state: ArrayTree, left: int, save: checkpoint.OnChunk):
        nonlocal resumed
        before = num_steps - left
        metrics = Metrics(files.metrics, before)
        resumed = {"step": before, "seconds": metrics.earlier} if before else None

        def on_chunk(done: int, now: ArrayTree, infos: ArrayTree) -> None:
            nonlocal stopping
            stopping = watch.caught  # asked once: a signal from here on is for the next chunk
            metrics.add(before + done, infos)
            save(done, now, infos)
            if stopping is not None:
                where = f"stopped at step {before + done} of {num_steps}, saved in {files.checkpoints}"
                raise signals.Stopped(where, stopping)

        with metrics:
            return fit(state, left, on_chunk)

    if not checkpoint.is_started(files.checkpoints):
        checkpoint.discard(files.checkpoints)  # a run that was killed before its first checkpoint binds nobody
    with signals.Watch() as watch:
        result, infos, seconds = checkpoint.resume(
            files.checkpoints, config, state, watched, info=info, num_steps=num_steps, every=flags.save_every,
            also=lambda seconds: stopping is not None or seconds >= LONGEST, warn=show.note,
        )  # fmt: skip
    return Ran(result, infos, seconds, resumed)


def finish(files: Files) -> None:
    """Removes the checkpoints: the output is written."""
    checkpoint.discard(files.checkpoints)


class Metrics:
    """A file of JSON lines, one for each chunk: `step` it ended at, means of its infos, `seconds` since the start.

    A run that goes on from step `step` keeps the lines up to there, so that none is missing and none is twice; its
    seconds go on too. Every line is on its way to the disk when `add` returns.

    Attributes:
      earlier: seconds at the last line that was kept.
    Raises: UserError when the file cannot be written.
    """

    def __init__(self, path: pathlib.Path, step: int):
        kept = _lines(path, step)
        record.write_text(path, "".join(line + "\n" for line in kept))
        self.earlier = float(json.loads(kept[-1])["seconds"]) if kept else 0.0
        self._path, self._started = path, time.perf_counter()

    def __enter__(self) -> "Metrics":
        self._file = self._path.open("ab", buffering=0)
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def add(self, step: int, infos: ArrayTree) -> None:
        """A line for the chunk that ended at `step`; `infos` are its NumPy arrays [steps, …]."""
        means = {name: np.mean(values, 0) for name, values in infos._asdict().items()}
        seconds = round(self.earlier + time.perf_counter() - self._started, 3)
        line = json.dumps(record.plain({"step": step, **means, "seconds": seconds})).encode() + b"\n"
        try:
            whole = self._file.write(line) == len(line)
        except OSError as error:
            raise UserError(f"cannot write {self._path}: {error.strerror}; make space and --resume") from None
        if not whole:
            raise UserError(f"cannot write {self._path}: the disk is full; make space and --resume")


def _lines(path: pathlib.Path, step: int) -> list[str]:
    """The file's lines up to `step`, as far as they are whole and in order."""
    kept, last = [], 0
    try:
        lines = path.read_text().splitlines() if step else []
    except (OSError, ValueError):
        return []
    for line in lines:
        try:
            found = json.loads(line)
            here, _ = int(found["step"]), float(found["seconds"])
        except (ValueError, TypeError, KeyError):
            break
        if not last < here <= step:
            break
        kept, last = [*kept, line], here
    return kept
