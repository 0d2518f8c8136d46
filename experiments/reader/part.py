"""One part of the fuzzing: files FIRST to FIRST+COUNT of one kind, in this process; prints what
became of them as JSON.

    python -m experiments.reader.part KIND FIRST COUNT

Equal arguments give equal files and the same `outcomes`. While jaxbd reads, every program started,
every file opened for writing and every look-up of an unpickler is noted.
"""

import hashlib
import json
import os
import pathlib
import random
import resource
import signal
import sys
import tempfile
import time
from typing import Any

WATCHED = {
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.Popen",
    "pickle.find_class",
    "os.remove",
    "os.rename",
    "os.mkdir",
    "shutil.rmtree",
    "ctypes.dlopen",
    "socket.connect",
}
MOST_SECONDS = 10
"""After which one file counts as a hang."""


class Hang(BaseException):
    """A file took longer than `MOST_SECONDS`."""


def main(kind: str, first: int, count: int) -> dict[str, Any]:
    """Makes, reads and judges the files."""
    from experiments.reader.targets import TARGETS, prepare

    prepare()
    target, watch, digest = TARGETS[kind], Watch(), hashlib.sha256()
    found: dict[str, Any] = {"refused": 0, "equal": 0, "unequal": [], "crashed": [], "hung": []}
    slowest, started, parent = 0.0, time.perf_counter(), os.getppid()
    with tempfile.TemporaryDirectory(dir=_memory_folder()) as scratch:
        path = pathlib.Path(scratch) / "file"
        for number in range(100):  # so that imports and caches are not counted as memory
            judge(target, target.make(random.Random(f"before-{number}")), path, watch)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in range(first, first + count):
            if os.getppid() != parent:
                raise SystemExit("whoever asked is gone")
            data = target.make(random.Random(f"{kind}-{number}"))
            said, seconds = judge(target, data, path, watch)
            slowest = max(slowest, seconds)
            _note(found, said, number)
            digest.update(f"{hashlib.sha256(data).hexdigest()} {said.split()[0]}\n".encode())
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {
        "kind": kind,
        "first": first,
        "files": count,
        **found,
        "executed": watch.events,
        "slowest_ms": 1000 * slowest,
        "megabytes": grown,
        "outcomes": digest.hexdigest(),
        "wall_seconds": time.perf_counter() - started,
        "readers": readers_digest(),
    }


def judge(target: Any, data: bytes, path: pathlib.Path, watch: "Watch") -> tuple[str, float]:
    """("refused", "equal", or "unequal", "crashed" or "hung" with more words; processor seconds
    that reading took)."""
    from jaxbd.base import UserError
    from jaxbd.limits import Refusal

    read, began = None, time.thread_time()
    before = signal.signal(signal.SIGALRM, _alarm)
    signal.alarm(MOST_SECONDS)
    try:
        with watch:
            read = target.read(data)
        said = "equal"
    except (UserError, Refusal) as error:
        is_one_line = str(error).isprintable() and len(str(error)) < 800
        said = "refused" if is_one_line else f"crashed with the message {str(error)!r}"
    except Hang:
        said = "hung"
    except BaseException as error:
        said = f"crashed {type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    seconds = time.thread_time() - began
    if read is not None and (wrong := target.difference(read, data, path)):
        said = f"unequal {wrong}"
    return said, seconds


def _note(found: dict[str, Any], said: str, number: int) -> None:
    kind, _, what = said.partition(" ")
    if kind in ("refused", "equal"):
        found[kind] += 1
    else:
        found[kind].append([number, what[:400]])


def _alarm(*_: Any) -> None:
    raise Hang


def _memory_folder() -> str | None:
    """Where files that other readers want on disk cost no disk access."""
    return "/dev/shm" if pathlib.Path("/dev/shm").is_dir() else None


class Watch:
    """Notes audited events as long as it is entered."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.entered = False
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple) -> None:
        if self.entered and (
            event in WATCHED or (event == "open" and (arguments[2] or 0) & 0o103)  # to write
        ):
            self.events.append(f"{event} {arguments!r}"[:200])

    def __enter__(self) -> None:
        self.entered = True

    def __exit__(self, *_: Any) -> None:
        self.entered = False


def readers_digest() -> str:
    """SHA-256 of the readers' source: which readers a result is about."""
    import jaxbd

    package = pathlib.Path(jaxbd.__file__).parent
    digest = hashlib.sha256()
    for name in READERS:
        digest.update((package / name).read_bytes())
    return digest.hexdigest()[:16]


READERS = (
    "limits.py",
    "zips.py",
    "interop/container.py",
    "interop/archive.py",
    "interop/torch_zip.py",
    "interop/torch_legacy.py",
    "interop/unpickle.py",
    "interop/allowed.py",
    "interop/state_dict.py",
    "interop/selection.py",
    "interop/pieces.py",
    "interop/safetensors_file.py",
)

if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
