"""Manners of jobs that take hours: checkpoints, `--resume`, metrics as JSON lines, and a clean end on a signal.

A verb adds `Flags` to its own and calls `prepare` before any work. The work is a `Job` of several stages, or one stage
with metrics, `run`. `finish` comes once the output is written. Beside an output `OUT` lie `OUT.run`, the checkpoints of
an unfinished run, and `OUT.metrics.jsonl`.
"""

import dataclasses
import json
import os
import pathlib
import re
import time
from typing import Any, NamedTuple

import numpy as np

from jaxbd import checkpoint, devices, record, stages
from jaxbd.base import ArrayTree, UserError
from jaxbd.cli import show, signals
from jaxbd.loop import Seconds

LONGEST = 600.0
"""Seconds after which a checkpoint is written even though fewer steps were done than asked for."""
SHORT = 60.0
"""Seconds after its start from which a job saves every stage when it ends; what ends sooner is done again instead."""
NAME = 40
"""Most letters of a stage's name in that of its folder."""


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


def prepare(out: pathlib.Path | None, flags: Flags) -> Files | None:
    """Finds out whether a run for `out` may start or go on; changes nothing. No output has no place for checkpoints.

    Raises: UserError when there is an unfinished run and no --resume, --resume and only a finished one, or --resume
      and no output.
    """
    if out is None:
        if flags.resume:
            raise UserError("--resume goes on with what lies beside the output; give the same --out as before")
        return None
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


class Job:
    """One run of several stages: what drivers take as their `keep`, and a context manager that heeds signals.

    Every stage has a folder of its own in OUT.run, named by its number and name: a run does the same stages in the same
    order each time. Stages that are saved whole are not run again.

    Attributes:
      resumed: {"stage", "step"} of the last stage that was saved before; None when this process did all of the run.
    """

    def __init__(self, files: Files | None, flags: Flags, config: dict[str, Any]):
        """`files` of a job that has no place for checkpoints are None: it saves nothing, and signals end it at once.

        `config` is everything the run depends on, see `checkpoint.resume`.
        """
        self.resumed: dict[str, Any] | None = None
        self._files, self._flags, self._config = files, flags, config
        known = json.dumps([record.plain(config), files is None]).encode()
        devices.check_same(
            "model, data, flags or versions", known, "start the same command with the same files everywhere"
        )
        self._count, self._started = 0, time.perf_counter()

    def __enter__(self) -> "Job":
        if self._files is not None:
            if devices.is_first() and not checkpoint.is_started(self._files.checkpoints):
                checkpoint.discard(self._files.checkpoints)  # killed before its first checkpoint, it binds nobody
            devices.from_all(0.0)  # no process looks at the folder before that is done
            self._watch = signals.Watch().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._files is not None:
            self._watch.__exit__(*error)

    def keep(
        self, name: str, state: ArrayTree, fit: stages.Fit, *, info: type, num_steps: int
    ) -> tuple[ArrayTree, ArrayTree, Seconds]:
        """Runs a stage from `state` or from its newest checkpoint, and saves on the way; see `stages.Keep`.

        Raises: signals.Stopped at the first end of a chunk after a signal, once a checkpoint is saved; UserError as
          `checkpoint.resume` does.
        """
        if self._files is None:
            return stages.through(name, state, fit, info=info, num_steps=num_steps)
        self._count += 1
        words = re.sub("[^a-z0-9]+", "-", name.lower())[:NAME].strip("-")
        return self.stage(f"{self._count}-{words}", name, state, fit, info=info, num_steps=num_steps)

    def stage(
        self, folder: str | None, name: str, state: ArrayTree, fit: stages.Fit, *, info: type, num_steps: int
    ) -> tuple[ArrayTree, ArrayTree, Seconds]:
        """`keep` with the name of the stage's folder; None for a job that is this one stage."""
        stopping, ending = None, False

        def watched(state: ArrayTree, left: int, save: checkpoint.OnChunk):
            before = num_steps - left
            if before:
                self.resumed = {"stage": name, "step": before}

            def on_chunk(done: int, now: ArrayTree, infos: ArrayTree) -> None:
                nonlocal stopping, ending
                # asked once: a signal from here on is for the next chunk; a signal to one process is for all
                stopping = int(devices.from_all(self._watch.caught or 0).max()) or None
                ending = done == left and time.perf_counter() - self._started >= SHORT
                save(done, now, infos)
                if stopping is not None:
                    where = f"step {before + done} of {num_steps}" + (f" of “{name}”" if folder else "")
                    raise signals.Stopped(f"stopped at {where}, saved in {self._files.checkpoints}", stopping)

            return fit(state, left, on_chunk)

        return checkpoint.resume(
            self._files.checkpoints, self._config, state, watched, info=info, num_steps=num_steps,
            every=self._flags.save_every, also=lambda seconds: stopping is not None or ending or seconds >= LONGEST,
            warn=show.note, stage=folder,
        )  # fmt: skip


def run(
    files: Files, flags: Flags, config: dict[str, Any], state: ArrayTree, fit: stages.Fit, *, info: type, num_steps: int
) -> Ran:
    """A job of one stage, with metrics: runs `fit` from `state` or from the newest checkpoint.

    Args:
      config, fit, info: see `checkpoint.resume`.
    Raises: as `Job.keep`, and UserError when the metrics cannot be written.
    """
    resumed = None

    def measured(state: ArrayTree, left: int, on_chunk: checkpoint.OnChunk):
        nonlocal resumed
        before = num_steps - left
        metrics = Metrics(files.metrics, before)
        resumed = {"step": before, "seconds": metrics.earlier} if before else None

        def add(done: int, now: ArrayTree, infos: ArrayTree) -> None:
            metrics.add(before + done, infos)
            on_chunk(done, now, infos)

        with metrics:
            return fit(state, left, add)

    with Job(files, flags, config) as job:
        return Ran(*job.stage(None, "", state, measured, info=info, num_steps=num_steps), resumed)


def finish(files: Files | None) -> None:
    """Removes the checkpoints: the output is written."""
    if files is not None:
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
        self._file = (self._path if devices.is_first() else pathlib.Path(os.devnull)).open("ab", buffering=0)
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
