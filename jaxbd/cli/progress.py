"""Progress on stderr: a bar on a terminal, an occasional plain line elsewhere. It is visible before
the first compile."""

import sys
import time
from typing import TextIO

from jaxbd.limits import clean_text

PLAIN_INTERVAL = 2.0
"""Minimum seconds between two plain lines of one stage."""
ESTIMATE_PERIOD = 900.0
"""Seconds over which the bar's remaining time is estimated; must cover several steps of the slowest
job."""


class Progress:
    """A context manager, called as `progress(label, steps done, total steps)`.

    A stage with no step done yet shows "compiling". The remaining time is estimated without the
    first steps, since those include compilation.
    """

    def __init__(self, stream: TextIO | None = None):
        self._stream = stream or sys.stderr
        self._bar, self._tasks = None, {}
        self._label, self._printed_at = "", 0.0
        self._since: tuple[int, float] | None = None
        self._began = 0
        self._started = time.perf_counter()

    def __enter__(self) -> "Progress":
        if self._stream.isatty():
            self._bar = _bar(self._stream)
            self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, label: str, done: int, total: int) -> None:
        label = clean_text(label)  # it may hold a name from a file
        if self._bar is not None:
            self._advance(label, done, total)
        else:
            self._print(label, done, total)

    def _advance(self, label: str, done: int, total: int) -> None:
        """Advances the stage's bar; the first call for a stage creates it."""
        assert self._bar is not None
        if label not in self._tasks:
            self._tasks[label] = self._bar.add_task(label, total=total, completed=done, note="")
        self._bar.update(
            self._tasks[label], completed=done, total=total, note="" if done else "compiling …"
        )

    def _print(self, label: str, done: int, total: int) -> None:
        """Prints a line for a stage's first and last step, and in between about every
        `PLAIN_INTERVAL` seconds."""
        now = time.perf_counter()
        fresh = label != self._label
        if fresh:
            self._began, self._since = done, None
        left = self._estimate_left(done, total, now)
        if fresh or done >= total or now - self._printed_at >= PLAIN_INTERVAL:
            what = f"step {done} of {total}{left}" if done else f"{total} steps, compiling …"
            print(f"[{now - self._started:6.1f} s] {label}: {what}", file=self._stream, flush=True)
            self._label, self._printed_at = label, now

    def _estimate_left(self, done: int, total: int, now: float) -> str:
        """ ", about 3 min left" once a step without compilation has been timed, until the last
        step; otherwise ""."""
        if self._since is None:
            self._since = (done, now) if done > self._began else None
            return ""
        first, since = self._since
        return (
            f", about {say_time((total - done) * (now - since) / (done - first))} left"
            if first < done < total
            else ""
        )


def say_time(seconds: float) -> str:
    """A duration in at most two units: "42 s", "3 min", "5 h 20 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _bar(stream: TextIO):
    """A rich progress bar with the stage, its steps and the remaining time."""
    from rich import console, progress

    columns = (
        progress.SpinnerColumn(),
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[note]}"),
    )
    return progress.Progress(
        *columns, console=console.Console(file=stream), speed_estimate_period=ESTIMATE_PERIOD
    )
