"""Many machines: the same command on each, joined by `jax.distributed` into one run. Quick to
import.

Requested by `--distributed`, or by an address in JAX_COORDINATOR_ADDRESS. Slurm and cloud TPUs are
recognised; elsewhere JAX_NUM_PROCESSES and JAX_PROCESS_ID give the number of processes and the
index of each. Only process 0 writes files and prints; the others report errors.
"""

import contextlib
import ctypes
import io
import os
import re
import signal
import sys
from collections.abc import Callable

from jaxbd.cli import signals

ADDRESS, COUNT, NUMBER = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
NUMBERS = (NUMBER, "SLURM_PROCID", "CLOUD_TPU_TASK_ID")
"""Variables that may hold this process's index before it has joined."""
JOINING, HEARTBEAT, LEAVING = 300, 30, 24 * 3600
"""Timeouts in seconds. JOINING: wait for the other processes at the start. HEARTBEAT: a process
silent this long counts as lost. LEAVING: finished processes wait for process 0, which writes."""
LOST = (
    "another process was lost, its own output may say why; the checkpoints are intact: start the"
    " same command on every machine again, with --resume to continue from the last one"
)
SIGNS_OF_LOSS = re.compile(
    r"gloo|nccl|coordination|UNAVAILABLE|connection (closed|reset|refused)|heartbeat", re.I
)
DIE_WITH_PARENT = 1
"""PR_SET_PDEATHSIG of Linux."""


def take_flags(argv: list[str]) -> tuple[bool, str | None, list[str]]:
    """(whether to join other machines, devices to use on this one, `argv` without these flags)."""
    rest, devices, joins = [], None, bool(os.environ.get(ADDRESS))
    words = iter(argv)
    for word in words:
        name, _, value = word.partition("=")
        if word == "--distributed":
            joins = True
        elif name == "--devices":
            devices = value or next(words, "")
        else:
            rest.append(word)
    return joins, devices, rest


def supervise(work: Callable[[], int]) -> int:
    """Runs `work` in a child process and returns its exit code.

    The runtime aborts a process that loses its peers; the parent survives, says in one line what
    killed the child, and returns exit code 2.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        try:
            code, agreed = _alone(work), True
        except KeyboardInterrupt:
            code, agreed = 128 + signal.SIGINT, False
        _end(code, agreed)
    # Slurm signals every process itself; a forwarded copy would count as the second signal, which
    # ends the child without saving
    forwarded = "SLURM_JOB_ID" not in os.environ

    def forward(number: int, _) -> None:
        with contextlib.suppress(ProcessLookupError):  # the child has just ended
            if forwarded:
                os.kill(child, number)

    for number in signals.SIGNALS:
        signal.signal(number, forward)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code >= 0:
        return code
    name = signal.Signals(-code).name
    own: dict[int, str] = {
        signal.SIGKILL: f"ended by {name}, possibly out of memory",
        signal.SIGABRT: LOST,
    }
    _say(f"jaxbd: {_own_name()}{own.get(-code, f'ended by {name}')}")
    return 2


def _alone(work: Callable[[], int]) -> int:
    """Runs `work` in its own session, so that Ctrl-C reaches it only once, through the parent; it
    dies with its parent."""
    os.setsid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
    if "JAXBD_DEBUG" not in os.environ:
        _silence_native_code()
    return work()


def _silence_native_code() -> None:
    """Sends the runtime's own output (stack traces, remarks) to /dev/null; Python's stdout and
    stderr are kept."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for name, number in (("stdout", 1), ("stderr", 2)):
        setattr(sys, name, open(os.dup(number), "w", buffering=1, errors="backslashreplace"))  # noqa: SIM115
        os.dup2(nowhere, number)


def join() -> None:
    """Waits for the other processes and joins them.

    Raises: UserError if the processes are not defined, or they do not appear in time.
    """
    import jax

    from jaxbd.base import UserError

    numbers = {
        "num_processes": os.environ.get(COUNT) or None,
        "process_id": os.environ.get(NUMBER) or None,
    }
    wrong = [f"{COUNT}={numbers['num_processes']}", f"{NUMBER}={numbers['process_id']}"]
    if not all(value is None or value.isdecimal() for value in numbers.values()):
        raise UserError(f"{' and '.join(wrong)} must be numbers")
    try:
        jax.distributed.initialize(
            num_processes=_as_int(numbers["num_processes"]),
            process_id=_as_int(numbers["process_id"]),
            initialization_timeout=JOINING,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=LEAVING,
        )
    except (ValueError, TypeError):
        raise UserError(
            f"neither Slurm nor a cloud TPU was found: set {ADDRESS} (host:port of process 0),"
            f" {COUNT} and {NUMBER}"
        ) from None
    except RuntimeError as error:
        raise UserError(f"cannot join the other processes: {str(error).splitlines()[0]}") from None
    if jax.process_index() != 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        sys.stderr = _Complaints(sys.stderr)  # pyright: ignore[reportArgumentType]


def is_joined() -> bool:
    """Whether this process is one of several."""
    return "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized()


def is_lost(error: Exception) -> bool:
    """Whether `error` looks like the failure of an exchange with a lost process."""
    return is_joined() and bool(SIGNS_OF_LOSS.search(str(error)))


def _as_int(text: str | None) -> int | None:
    return None if text is None else int(text)


class _Complaints(io.TextIOBase):
    """A stream that passes on only lines beginning with "jaxbd: ", prefixed with the process."""

    def __init__(self, stream: io.TextIOBase):
        self._stream, self._line = stream, ""

    def write(self, text: str) -> int:
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            if line.startswith("jaxbd: "):
                self._stream.write(f"jaxbd: {_own_name()}{line.removeprefix('jaxbd: ')}\n")
                self._stream.flush()
        return len(text)


def _own_name() -> str:
    """ "process 1: ", or "" if the index is not known."""
    if is_joined():
        return f"process {sys.modules['jax'].process_index()}: "
    return next((f"process {os.environ[name]}: " for name in NUMBERS if name in os.environ), "")


def _end(code: int, agreed: bool) -> None:
    """Ends this process with `code`; after success, or a stop agreed by all, waits for the others
    first."""
    if code != 2 and agreed and is_joined():
        # the work is done, so a process that is lost from here on does no harm
        with contextlib.suppress(Exception):
            sys.modules["jax"].distributed.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
