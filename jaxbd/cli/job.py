"""Runs that can be stopped and resumed: checkpoints beside the output, metrics, signals.

A verb adds `Flags` to its own flags, calls `prepare` before any work, works inside `open_run`, and
calls `finish` once the output is written. Next to an output `OUT` are `OUT.run`, the checkpoints of
an unfinished run, and `OUT.metrics.jsonl`.
"""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from jaxbd import devices, files
from jaxbd.base import UserError
from jaxbd.cli import metrics, show, signals
from jaxbd.cli.metrics import Metrics
from jaxbd.cli.progress import Progress
from jaxbd.training import checkpoint, lock
from jaxbd.training.run import Checkpoints, Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """How a run is stopped and resumed.

    Attributes:
      resume: continue the run in OUT.run; on the same kind of machine the result is the same bit
        for bit.
      save_every: steps between two checkpoints; one is also written after ten minutes without any.
      force: replace an existing output.
    """

    resume: bool = False
    save_every: int = 500
    force: bool = False

    @property
    def replace(self) -> bool:
        """Whether the output whose run is continued may be replaced; with --resume, `prepare` still
        refuses one without an unfinished run. For other outputs, see `may_replace`."""
        return self.force or self.resume

    def __post_init__(self):
        if self.save_every < 1:
            raise UserError(f"--save-every must be at least 1 step, got {self.save_every}")


class Paths(NamedTuple):
    """The folder of checkpoints and the metrics file."""

    checkpoints: pathlib.Path
    metrics: pathlib.Path


def prepare(out: pathlib.Path | None, flags: Flags) -> Paths | None:
    """Checks whether a run for `out` may start or resume; changes nothing.

    Returns: None without an output, since there is then no place for checkpoints.
    Raises: UserError if another process works on `out`; if there is an unfinished run but no
      --resume; with --resume, if there is only a finished run, or no output.
    """
    if out is None:
        if flags.resume:
            raise UserError(
                "--resume continues the run beside the output; give the same --out as before"
            )
        return None
    out = out.absolute()
    paths = _beside(out)
    lock.check(paths.checkpoints)
    _check_state(out, paths, flags)
    if flags.resume and not checkpoint.is_started(paths.checkpoints):
        show.note(f"nothing to resume at {paths.checkpoints}: starting from the beginning")
    return paths


def may_replace(out: pathlib.Path | None, flags: Flags) -> bool:
    """Whether the outputs besides `out` may be replaced: with --force, or if --resume continues an
    unfinished run beside `out`, which may have written some of them."""
    started = out is not None and checkpoint.is_started(_beside(out).checkpoints)
    return flags.force or (flags.resume and started)


def _beside(out: pathlib.Path) -> Paths:
    return Paths(*(out.with_name(out.name + ending) for ending in (".run", ".metrics.jsonl")))


def _check_state(out: pathlib.Path, paths: Paths, flags: Flags) -> None:
    """Raises UserError if there is an unfinished run but no --resume, or the other way round."""
    started = checkpoint.is_started(paths.checkpoints)
    if started and not flags.resume:
        raise UserError(
            f"{paths.checkpoints} is an unfinished run; give --resume to continue it, or delete it"
            " to start over"
        )
    if flags.resume and not started and out.exists():
        raise UserError(
            f"nothing to resume: {out} exists, without an unfinished run beside it; leave --resume"
            " out"
        )


@contextlib.contextmanager
def open_run(
    paths: Paths | None, flags: Flags, identity: dict[str, Any], *, with_metrics: bool = False
) -> Iterator[Run]:
    """A `Run` with a progress bar; if there are `paths`, it also checkpoints and handles signals.

    Without a place for checkpoints a signal ends the program at once.

    Args:
      identity: everything the run depends on, see `checkpoint.restore`.
      with_metrics: whether the infos of every stage go to the metrics file.
    """
    known = json.dumps([files.plain(identity), paths is None]).encode()
    fix = "start the same command with the same files everywhere"
    devices.check_same("model, data, flags or versions", known, fix)
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(Progress())
        if paths is None:
            yield Run(progress=progress, notice=show.note)
            return
        stack.enter_context(lock.hold(paths.checkpoints))
        started = checkpoint.is_started(paths.checkpoints)
        if devices.is_first() and not started:
            # left by a run that was killed before its first checkpoint
            checkpoint.discard(paths.checkpoints)
        devices.from_all(0.0)  # barrier: no process may read the folder before it is discarded
        watch = stack.enter_context(signals.Watch())
        observers = ()
        if with_metrics:
            observers = (stack.enter_context(Metrics(paths.metrics, started)).add,)
        yield Run(
            progress=progress,
            notice=show.note,
            checkpoints=Checkpoints(paths.checkpoints, identity, flags.save_every, show.note),
            stop_requested=lambda: watch.caught,
            observers=observers,
        )


def describe_resumed(run: Run, paths: Paths) -> dict[str, Any] | None:
    """Stage and step at which this process resumed, and the seconds the run had taken by then; None
    if this process did the whole run."""
    if run.resumed is None:
        return None
    seconds = metrics.seconds_at(paths.metrics, run.resumed["stage"], run.resumed["step"])
    return {**run.resumed, "seconds": seconds}


def finish(paths: Paths | None) -> None:
    """Removes the checkpoints; call it once the output is written."""
    if paths is not None:
        checkpoint.discard(paths.checkpoints)
