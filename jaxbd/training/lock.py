"""A file lock that lets one process at a time work on an output. The operating system releases the
lock of a process that dies, so stale lock files block nobody."""

import contextlib
import datetime
import os
import pathlib
import socket
from collections.abc import Iterator

from jaxbd import devices
from jaxbd.base import UserError

try:
    import fcntl
except ImportError:  # Windows has no fcntl; nothing is locked there
    fcntl = None


def lock_file(path: str | os.PathLike) -> pathlib.Path:
    """The lock file of `path`, a hidden file in the same folder."""
    path = pathlib.Path(path).absolute()
    return path.with_name(f".{path.name}.lock")


@contextlib.contextmanager
def hold(path: str | os.PathLike) -> Iterator[None]:
    """Holds the lock of the output `path` (a file or folder that may not exist yet).

    Every process of a run must call this; only the first takes the lock.

    Raises: UserError, in every process, when another run holds the lock (the message names it) or
      when the lock file cannot be written.
    """
    file, complaint = None, ""
    if devices.is_first() and fcntl is not None:
        try:
            file, complaint = _acquire(pathlib.Path(path))
        except OSError as error:
            complaint = f"{path} cannot be written: {error.strerror}; choose a writable folder"
    if devices.from_all(bool(complaint)).any():
        raise UserError(complaint or f"{path} is in use or cannot be written, says process 0")
    try:
        yield
    finally:
        if file is not None:
            # unlink before closing: once released, the file may already be another process's lock
            lock_file(path).unlink(missing_ok=True)
            os.close(file)


def check(path: str | os.PathLike) -> None:
    """Raises UserError when another run holds the lock of `path`; changes nothing."""
    complaint = ""
    if devices.is_first() and fcntl is not None and lock_file(path).exists():
        try:
            with lock_file(path).open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            complaint = _complain(pathlib.Path(path), lock_file(path).read_bytes()[:200])
        except OSError:
            pass  # already gone, or unreadable: `hold` reports that
    if devices.from_all(bool(complaint)).any():
        raise UserError(complaint or f"{path} is in use, says process 0")


def _complain(path: pathlib.Path, holder: bytes) -> str:
    """The message that another process holds the lock; `holder` is what that process wrote."""
    who = holder.decode(errors="replace").strip() or "another process"
    return f"{path} is in use by {_printable(who)}; wait for it to end"


def _acquire(path: pathlib.Path) -> tuple[int | None, str]:
    """Returns (descriptor of the locked file, ""), or (None, complaint that names the holder)."""
    assert fcntl is not None
    place = lock_file(path)
    place.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = os.open(place, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            complaint = _complain(path, os.read(file, 200))
            os.close(file)
            return None, complaint
        except BaseException:
            os.close(file)
            raise
        if _is_at(place, file):
            break
        os.close(file)  # the holder unlinked it between open and flock: open the new file
    now = datetime.datetime.now().isoformat(" ", "seconds")
    os.ftruncate(file, 0)
    os.write(file, f"another process ({os.getpid()} on {socket.gethostname()}, {now})\n".encode())
    return file, ""


def _is_at(place: pathlib.Path, file: int) -> bool:
    """Whether the open file is still the one at `place`."""
    try:
        return os.path.samestat(os.fstat(file), place.stat())
    except FileNotFoundError:
        return False


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)
