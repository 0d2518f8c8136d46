"""The file of metrics beside an output: JSON lines while a run is going on."""

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
    """A context manager that writes one line for each chunk of a run.

    A line holds the `stage`, the `step` it ended at, the means of the chunk's infos, and `seconds`
    since the start. A resumed run keeps the lines that lie before the step it resumes at, so that
    none is missing and none is twice; its seconds go on too. Every line is on its way to the disk
    when `add` returns.

    Attributes:
      earlier: seconds at the last line of an earlier part of the run.
    """

    def __init__(self, path: pathlib.Path, resumes: bool):
        """`resumes` says whether the run goes on where an earlier process stopped."""
        self.earlier = 0.0
        self._path, self._resumes, self._started = path, resumes, time.perf_counter()
        self._file: Any = None

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, stage: str, chunk: Chunk, first: int) -> None:
        """A line for a chunk of a stage that this process began at step `first`.

        Raises: UserError when the file cannot be written.
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
                f"cannot write {self._path}: {error.strerror}; make space and --resume"
            ) from None
        if not whole:
            raise UserError(f"cannot write {self._path}: the disk is full; make space and --resume")

    def _open(self, stage: str, first: int) -> None:
        """Keeps the lines of earlier stages and of this one up to step `first`; then appends."""
        lines = _read_lines(self._path, stage, first) if self._resumes else []
        files.write_text(self._path, "".join(line + "\n" for line in lines))
        self.earlier = float(json.loads(lines[-1])["seconds"]) if lines else 0.0
        path = self._path if devices.is_first() else pathlib.Path(os.devnull)
        self._file = path.open("ab", buffering=0)


def seconds_at(path: pathlib.Path, stage: str, step: int) -> float:
    """Seconds that a run had taken when it reached a step of a stage; 0 where no line says so."""
    lines = _read_lines(path, stage, step)
    return float(json.loads(lines[-1])["seconds"]) if lines else 0.0


def _mean(values: Any) -> Any:
    """Means over steps; of a field that holds several arrays, by their names."""
    if isinstance(values, dict):
        return {name: np.mean(each, 0) for name, each in values.items()}
    return np.mean(values, 0)


def _read_lines(path: pathlib.Path, stage: str, first: int) -> list[str]:
    """The whole lines of a stopped run: of the stages before `stage`, and of it up to step
    `first`."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, ValueError):
        return []
    kept: list[str] = []
    for line in lines:
        try:
            found = json.loads(line)
            own, step, _ = found["stage"] == stage, int(found["step"]), float(found["seconds"])
        except (ValueError, TypeError, KeyError):
            break
        if own and step > first:
            break
        kept.append(line)
    return kept
