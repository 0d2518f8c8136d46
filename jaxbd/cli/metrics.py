"""The metrics file beside an output: lines of JSON, written during a run."""

import json
import os
import pathlib
import time
from typing import Any

import numpy as np

from jaxbd import devices, files
from jaxbd.base import UserError
from jaxbd.training.loop import Chunk


class Metrics:
    """A context manager that writes one line per chunk of a run.

    A line holds the `stage`, the `step` at the end of the chunk, the means of the chunk's infos,
    and `seconds` since the start. A resumed run keeps the lines up to the step it resumes at, so no
    line is missing or duplicated, and its seconds continue. Writes are unbuffered: when `add`
    returns, the line has been handed to the operating system.

    Attributes:
      earlier: seconds at the last line kept from earlier parts of the run.
    """

    def __init__(self, path: pathlib.Path, resumes: bool):
        """`resumes` says whether the run continues where an earlier process stopped."""
        self.earlier = 0.0
        self._path, self._resumes, self._started = path, resumes, time.perf_counter()
        self._file: Any = None

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, stage: str, chunk: Chunk, first: int) -> None:
        """Writes a line for a chunk of a stage that this process began at step `first`.

        Raises: UserError if the file cannot be written.
        """
        fields = chunk.infos._asdict()
        if not fields:
            return
        if self._file is None:
            self._open(stage, first)
        assert self._file is not None
        means = {name: files.plain(_mean(values)) for name, values in fields.items()}
        seconds = round(self.earlier + time.perf_counter() - self._started, 3)
        content = {"stage": stage, "step": first + chunk.done, **means, "seconds": seconds}
        line = json.dumps(files.plain(content)).encode() + b"\n"
        try:
            whole = self._file.write(line) == len(line)
        except OSError as error:
            raise UserError(
                f"cannot write {self._path}: {error.strerror}; free some space and --resume"
            ) from None
        if not whole:
            raise UserError(
                f"cannot write {self._path}: the disk is full; free some space and --resume"
            )

    def _open(self, stage: str, first: int) -> None:
        """Opens the file for appending; keeps the lines of earlier stages, and of this stage up to
        step `first`."""
        lines = _read_lines(self._path, stage, first) if self._resumes else []
        files.write_text(self._path, "".join(line + "\n" for line in lines))
        self.earlier = float(json.loads(lines[-1])["seconds"]) if lines else 0.0
        path = self._path if devices.is_first() else pathlib.Path(os.devnull)
        self._file = path.open("ab", buffering=0)


def seconds_at(path: pathlib.Path, stage: str, step: int) -> float:
    """Seconds a run had taken when it reached a step of a stage; 0 if no line records it."""
    lines = _read_lines(path, stage, step)
    return float(json.loads(lines[-1])["seconds"]) if lines else 0.0


def _mean(values: Any) -> Any:
    """The mean over steps; for a field with several arrays, one mean per name."""
    if isinstance(values, dict):
        return {name: np.mean(each, 0) for name, each in values.items()}
    return np.mean(values, 0)


def _read_lines(path: pathlib.Path, stage: str, first: int) -> list[str]:
    """The complete lines of a stopped run: all stages before `stage`, and `stage` up to step
    `first`."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, ValueError):
        return []
    whole: list[str] = []
    for line in lines:
        try:
            found = json.loads(line)
            own, step, _ = found["stage"] == stage, int(found["step"]), float(found["seconds"])
        except (ValueError, TypeError, KeyError):
            break
        if own and step > first:
            break
        whole.append(line)
    return whole
