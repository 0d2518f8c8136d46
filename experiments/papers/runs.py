"""Runs of the papers' experiments: they resume, and stop once time is over."""

import json
import pathlib
import shutil
import signal
import time
from typing import Any

from experiments import units
from experiments.papers import ledger
from jaxbd import files
from jaxbd.training.run import Checkpoints, Run

STOP: list[float | None] = [None]
"""`time.monotonic()` from which runs of this process stop and save; None: never."""


def stop_after(minutes: float | None) -> float | None:
    """Stops the runs of this process so many minutes from now, never for None; returns when, by
    `time.monotonic()`."""
    STOP[0] = None if minutes is None else time.monotonic() + 60 * minutes
    return STOP[0]


def start_run(name: str, depends: Any) -> Run:
    """A run that resumes where it has the same settings and code, and stops once time is over."""
    stated = {"run": files.plain(depends), **files.versions()}
    where = _folder(name) / ledger.digest(json.dumps(stated))
    over = lambda: signal.SIGTERM if STOP[0] is not None and time.monotonic() >= STOP[0] else None
    return Run(
        progress=units.progress(name),
        checkpoints=Checkpoints(where, stated, every=400),
        stop_requested=over,
    )


def forget_run(name: str) -> None:
    """Removes the checkpoints of a run that is done."""
    shutil.rmtree(_folder(name), ignore_errors=True)


def _folder(name: str) -> pathlib.Path:
    return units.RUNS / "papers" / "checkpoints" / name
