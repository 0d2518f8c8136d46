"""A run: how drivers report, save and stop. Every training loop of jaxbd is the `for` in
`Run.follow`.

A run must go through the same stages in the same order each time: a stage finds its checkpoints by
its position.
"""

import dataclasses
import re
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax

from jaxbd import devices
from jaxbd.base import ArrayTree, Key, UserError
from jaxbd.training import checkpoint, loop
from jaxbd.training.loop import Chunk
from jaxbd.training.program import Clock, Seconds, Time

LONGEST = 600.0
"""Seconds after which a checkpoint is written even if fewer than `every` steps were made."""
SHORT = 60.0
"""The end of a stage is saved only from this many seconds after the run's start on; a resumed run
repeats shorter stages."""
NAME = 40
"""Maximum characters of a stage's name in its folder's name."""


class NoInfo(NamedTuple):
    """Infos of a stage that records none per step."""


class Fitted(NamedTuple):
    """Result of a stage: its last state, infos [num_steps, …] as NumPy, and the seconds this
    process spent."""

    state: ArrayTree
    infos: Any
    seconds: Seconds


class Stopped(Exception):
    """A run saved a checkpoint and ended early because a stop was requested.

    Attributes:
      stopped_by: number of the signal that requested it.
    """

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.stopped_by = signal


class Checkpoints(NamedTuple):
    """Where a run saves and how often.

    Attributes:
      folder: used by this run alone; made when absent.
      config: everything the run depends on, see `checkpoint.restore`.
      every: steps between two checkpoints, at least 1.
      warn: called with one line for each damaged checkpoint that was skipped.
    """

    folder: Any
    config: dict[str, Any]
    every: int = 500
    warn: Callable[[str], None] = warnings.warn


Progress = Callable[[str, int, int], None]
"""(name of the stage, steps done, total steps)"""
Observer = Callable[[str, Chunk, int], None]
"""(name of the stage, chunk, steps made before this process began)"""


def report_nothing(name: str, done: int, total: int) -> None:
    """A `Progress` callback that does nothing."""


@dataclasses.dataclass(kw_only=True)
class Run:
    """How a driver runs. The default reports and saves nothing.

    Attributes:
      progress: called at the start of a stage and after each of its chunks.
      checkpoints: where to save and resume; None to do neither.
      stop_requested: () -> number of the signal that asks the run to end, or None. Only a run with
        checkpoints ends early.
      notice: called with one line when something changes during the run, for example fewer cells at
        a time after the device ran out of memory.
      observers: called after each chunk of every stage, for example to write metrics.
      over_time: mode over time, see `loop`.
      resumed: {"stage", "step"} of the last stage that began at a checkpoint; None if this process
        made all steps.
    """

    progress: Progress = report_nothing
    checkpoints: Checkpoints | None = None
    stop_requested: Callable[[], int | None] = lambda: None
    notice: Callable[[str], None] = warnings.warn
    observers: tuple[Observer, ...] = ()
    over_time: Time = "auto"
    resumed: dict[str, Any] | None = None

    def __post_init__(self):
        if self.checkpoints is not None and self.checkpoints.every < 1:
            raise UserError(
                f"checkpoints must be at least 1 step apart, got {self.checkpoints.every}"
            )
        self._stages, self._started = 0, time.perf_counter()

    def fit(
        self,
        name: str,
        key: Key,
        step: loop.Step,
        draw: Callable[..., Any] | None,
        data: ArrayTree,
        state: ArrayTree,
        *extra: ArrayTree,
        info: type,
        num_steps: int,
        chunk: int = 20,
        rows: int | None = None,
    ) -> Fitted:
        """Trains: `step(key, state, batch, *extra) -> (state, info)` on batches `draw(key, data)`.

        The last state is the result; no "best" state is selected. A resumed run equals an
        uninterrupted one bit for bit, since the key of a step depends only on `key` and
        `state.step`.

        Args:
          name: of the stage, for progress and checkpoints; several stages may share a name.
          draw: None for steps that take no batch.
          extra: further arrays that the step takes.
          info: the step's `Info`, a NamedTuple class.
          rows: batch size, if the step makes its own batches without `draw`; see `loop.chunks`.
        Raises: loop.NotFinite when a loss diverges; Stopped after a stop request; UserError when a
          checkpoint cannot be read or written.
        """
        advance = loop.with_batches(step, draw)
        rows = rows or loop.batch_rows(draw, key, data)

        def chunks(state: ArrayTree, left: int) -> Iterable[Chunk]:
            return loop.chunks(
                advance,
                state,
                key,
                data,
                extra,
                num_steps=left,
                over_time=self.over_time,
                chunk=chunk,
                rows=rows,
            )

        return self.follow(name, state, chunks, info=info, num_steps=num_steps)

    def follow(
        self,
        name: str,
        state: ArrayTree,
        chunks: Callable[[ArrayTree, int], Iterable[Chunk]],
        *,
        info: type,
        num_steps: int,
    ) -> Fitted:
        """Runs one stage: `chunks(state, steps left)` from `state` or from the newest checkpoint.

        Reports, saves and stops between chunks; see `fit`.
        """
        clock, stage = Clock(), self._open(name, state, info)
        first, state = stage.saved.step, stage.saved.state
        if first > num_steps:
            raise UserError(
                f"{stage.where} is at step {first}, past the {num_steps} asked for; choose another"
                " folder"
            )
        if first:
            self.resumed = {"stage": name, "step": first}
        self.progress(name, first, num_steps)
        collected = [stage.saved.infos] if first else []
        for chunk in chunks(state, num_steps - first):
            collected.append(chunk.infos)
            self.progress(name, first + chunk.done, num_steps)
            for observe in self.observers:
                observe(name, chunk, first)
            self._save_or_stop(stage, chunk, collected, num_steps)
            state = chunk.get_state  # called once, after the last chunk: it may copy
        state = state() if callable(state) else state
        jax.block_until_ready(state)
        return Fitted(state, loop.join_infos(collected), clock.read())

    def _open(self, name: str, state: ArrayTree, info: type) -> "_Stage":
        """Opens a stage at its newest checkpoint, or at its start."""
        fresh = checkpoint.Saved(state, None, 0)
        if self.checkpoints is None:
            return _Stage(name, fresh, None, "")
        # numbered, because several stages may share a name
        self._stages += 1
        words = re.sub("[^a-z0-9]+", "-", name.lower())[:NAME].strip("-")
        where, config, _, warn = self.checkpoints
        folder = f"{self._stages}-{words}"
        saved = checkpoint.restore(where, config, state, info, warn, folder)
        step = str(saved.step if saved else 0).encode()
        # processes that resume from different steps would wait for each other forever
        devices.check_same(
            "checkpoint", step, f"{where} must lie on a disk that all machines share"
        )
        writer = checkpoint.Writer(where, config, state, restored=saved, stage=folder)
        return _Stage(name, saved or fresh, writer, str(where))

    def _save_or_stop(
        self, stage: "_Stage", chunk: Chunk, collected: list[ArrayTree], num_steps: int
    ) -> None:
        """Writes a checkpoint if one is due or a stop was requested; then stops if requested."""
        if self.checkpoints is None or stage.writer is None:
            return
        # read once: a later signal waits for the next chunk; a signal to one process stops them all
        signal = int(devices.from_all(self.stop_requested() or 0).max()) or None
        done = stage.saved.step + chunk.done
        # clocks differ between processes, but all must save together
        if signal is not None or devices.from_all(self._is_due(stage, done, num_steps)).any():
            # in place, so that the next save does not join the same chunks again
            collected[:] = [loop.join_infos(collected)]
            stage.writer.write(checkpoint.Saved(chunk.get_state(), collected[0], done))
        if signal is not None:
            where = f"step {done} of {num_steps} of “{stage.name}”"
            raise Stopped(f"stopped at {where}, saved in {stage.where}", signal)

    def _is_due(self, stage: "_Stage", done: int, num_steps: int) -> bool:
        """Whether a checkpoint is due after `done` steps, judged by this process's clock."""
        assert self.checkpoints is not None and stage.writer is not None
        return (
            done - stage.writer.step >= self.checkpoints.every
            or stage.writer.seconds_since() >= LONGEST
            or (done == num_steps and time.perf_counter() - self._started >= SHORT)
        )


class _Stage(NamedTuple):
    name: str
    saved: checkpoint.Saved
    writer: checkpoint.Writer | None
    where: str
