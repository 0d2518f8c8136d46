"""Runs parts of the fuzzing in processes forked from one that has imported and traced everything,
which takes longer than a part.

    python -m experiments.reader.nursery

It reads lines of KIND FIRST COUNT, and answers each with a JSON line: the part's result, or
{"died": exit status}.
"""

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from typing import Any

from experiments import units

ENDED = -1
"""Status of a part that took too long, or whose nursery is gone."""


class Nursery:
    """The process, started when it is needed and again once it was ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (it is closed with the program)
        atexit.register(self.end)

    def run(self, kind: str, first: int, count: int, seconds: float) -> dict[str, Any]:
        """The part's result, or {"died": status}. After `seconds` all are killed."""
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        clock = threading.Timer(seconds, self.end)
        clock.start()
        try:
            process.stdin.write(f"{kind} {first} {count}\n".encode())
            process.stdin.flush()
            answer = process.stdout.readline()
        except OSError:
            answer = b""
        finally:
            clock.cancel()
        if not answer:
            self.end()
            return {"died": ENDED}
        return json.loads(answer)

    def complaints(self) -> str:
        """The end of what its processes said about themselves."""
        self._errors.seek(0)
        return self._errors.read()[-300:].decode("utf-8", "replace")

    def end(self) -> None:
        """Kills the process and the part that it runs."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for pipe in (process.stdin, process.stdout):
            # what could not be sent to a process that is gone is lost with it
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()

    def _started(self) -> subprocess.Popen:
        if self._process is None or self._process.poll() is not None:
            self.end()
            self._process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "experiments.reader.nursery"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                cwd=units.ROOT,
                start_new_session=True,
            )
        return self._process


def serve() -> None:
    """Answers until there are no more lines."""
    from experiments.reader import part, targets

    targets.prepare()
    parent = os.getppid()
    for line in iter(sys.stdin.readline, ""):
        kind, first, count = line.split()
        child = os.fork()
        if child == 0:
            print(json.dumps(part.main(kind, int(first), int(count))), flush=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            print(json.dumps({"died": os.waitstatus_to_exitcode(status)}), flush=True)
        if os.getppid() != parent:
            return


if __name__ == "__main__":
    serve()
