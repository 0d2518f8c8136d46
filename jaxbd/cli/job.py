"""Runs that can be stopped and resumed: checkpoints beside the output, metrics, signals.

A verb adds `Flags` to its own, calls `prepare` before any work, works inside `open_run`, and calls
`finish` once the output is written. Beside an output `OUT` lie `OUT.run`, the checkpoints of an
unfinished run, and `OUT.metrics.jsonl`.
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
    """How a run may be stopped.

    Attributes:
      resume: go on with the run in OUT.run; on the same kind of machine the result is the same bit
        for bit.
      save_every: steps between two checkpoints; there is also one after ten minutes without any.
      force: replace what lies where the output goes.
    """

    resume: bool = False
    save_every: int = 500
    force: bool = False

    @property
    def replace(self) -> bool:
        """Whether an output that is there may be replaced."""
        return self.force or self.resume

    def __post_init__(self):
        if self.save_every < 1:
            raise UserError(f"--save-every must be at least 1 step, got {self.save_every}")


class Paths(NamedTuple):
    """Folder of the checkpoints, file of the metrics."""

    checkpoints: pathlib.Path
    metrics: pathlib.Path


def prepare(out: pathlib.Path | None, flags: Flags) -> Paths | None:
    """Finds out whether a run for `out` may start or go on; changes nothing.

    Returns: None without an output, which leaves no place for checkpoints.
    Raises: UserError when another process works on `out`; when there is an unfinished run and no
      --resume, --resume and only a finished one, or --resume and no output.
    """
    if out is None:
        if flags.resume:
            raise UserError(
                "--resume goes on with what lies beside the output; give the same --out as before"
            )
        return None
    out = out.expanduser().absolute()
    paths = Paths(*(out.with_name(out.name + ending) for ending in (".run", ".metrics.jsonl")))
    lock.check(paths.checkpoints)
    _check_state(out, paths, flags)
    if flags.resume and not checkpoint.is_started(paths.checkpoints):
        show.note(f"nothing to resume at {paths.checkpoints}: this run starts at the beginning")
    return paths


def _check_state(out: pathlib.Path, paths: Paths, flags: Flags) -> None:
    """Raises UserError where an unfinished run or its lack contradicts --resume."""
    started = checkpoint.is_started(paths.checkpoints)
    if started and not flags.resume:
        raise UserError(
            f"{paths.checkpoints} is an unfinished run; give --resume to go on, or delete it to"
            " start over"
        )
    if flags.resume and not started and out.exists():
        raise UserError(
            f"nothing to resume: {out} is there, without an unfinished run beside it; leave"
            " --resume out"
        )


@contextlib.contextmanager
def open_run(
    paths: Paths | None, flags: Flags, identity: dict[str, Any], *, with_metrics: bool = False
) -> Iterator[Run]:
    """A `Run` with a progress bar; with checkpoints, and an ear for signals, where there are paths.

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
            # killed before its first checkpoint, it binds nobody
            checkpoint.discard(paths.checkpoints)
        devices.from_all(0.0)  # no process looks at the folder before that is done
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
    """Stage and step at which this process went on, and the seconds that the run had taken by then;
    None where this process did all."""
    if run.resumed is None:
        return None
    seconds = metrics.seconds_at(paths.metrics, run.resumed["stage"], run.resumed["step"])
    return {**run.resumed, "seconds": seconds}


def finish(paths: Paths | None) -> None:
    """Removes the checkpoints: the output is written."""
    if paths is not None:
        checkpoint.discard(paths.checkpoints)
