"""Runs the queue: each item a process with a time of its own, each record written at once.

Nothing here asks for a device: memory that this process took would be missing to the items.
"""

import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from experiments import units
from experiments.accelerator import records
from experiments.accelerator.queue import Item, fill
from jaxbd import files
from jaxbd.base import UserError

GRACE = 20.0
"""Seconds to save and end after SIGTERM, and of every run for what comes after its last item."""
LEAST = 20.0
"""Seconds that must be left for another item to begin."""
PATIENCE = 5
"""Factor of an item's seconds at toy size: a CPU that is busy with other work takes longer than an
accelerator, and to end an item early would look like a failure of the program."""
MOST_FILES, MOST_BYTES, MOST_CONTENT = 8, 16 << 20, 1 << 20
"""What may come back: files, bytes of each, bytes of one record's content."""
TAIL, WIDEST = 30, 400
"""Lines of output that a record of what failed keeps, and characters of each."""
PROBE = """
import jax, json
device = jax.devices()[0]
print(json.dumps([jax.default_backend(), device.device_kind, jax.device_count()]))
"""


class Place(NamedTuple):
    """Where a run works.

    Attributes:
      out: what comes back.
      work: everything else: what items store for one another.
      shared: real images and published models.
      site: packages that the interpreter lacks; None for none.
      toy: whether items run at toy size, on the CPU.
    """

    out: pathlib.Path
    work: pathlib.Path
    shared: pathlib.Path
    site: pathlib.Path | None = None
    toy: bool = False


class Machine(NamedTuple):
    """What the items run on: a backend's name, the device in words."""

    backend: str
    device: str


def environment(place: Place, item: Item | None = None) -> dict[str, str]:
    """Of an item's process."""
    found = dict(os.environ)
    paths = [str(place.site or ""), str(units.ROOT), found.get("PYTHONPATH", "")]
    found |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    found["JAXBD_SHARED"] = str(place.shared)
    if place.toy:
        return {**found, "JAX_PLATFORMS": "cpu"}
    return {**found, **dict(item.environment if item else ())}


def probe(place: Place, seconds: float = 120) -> Machine:
    """Asks a process what its devices are. Raises: UserError when it finds none in that time."""
    words = [sys.executable, "-c", PROBE]
    try:
        done = subprocess.run(
            words, env=environment(place), capture_output=True, text=True, timeout=seconds
        )
        backend, kind, count = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, ValueError, IndexError) as error:
        why = type(error).__name__
        fix = "try python -c 'import jax; jax.devices()'"
        raise UserError(f"JAX finds no device here ({why}); {fix}") from None
    if backend == "cpu":
        return Machine(backend, f"{kind} ({os.cpu_count()} cores)")
    return Machine(backend, f"{kind} x{count}")


def lacks(item: Item, place: Place) -> list[str]:
    """What the item needs and is not there."""
    there = {
        "torch": importlib.util.find_spec("torch") is not None,
        "data": (place.shared / "data" / "cifar10").is_dir(),
        "models": (place.shared / "models" / "ibau").is_dir(),
    }
    return [need for need in item.needs if not there[need]]


def run(
    items: list[Item],
    place: Place,
    machine: Machine,
    seconds: float,
    say: Callable[[str], None] = units.say,
) -> list[dict[str, Any]]:
    """Runs the items in order until the seconds are over. Returns their records, which are also in
    `place.out`."""
    deadline, code, found = time.monotonic() + seconds - GRACE, records.code_hash(), []
    place.out.mkdir(parents=True, exist_ok=True)
    known = {"code": code, "versions": files.versions(), "toy": place.toy, **machine._asdict()}
    for number, item in enumerate(items):
        left = deadline - time.monotonic()
        if left < LEAST:
            say(f"time is over; {len(items) - number} items were not begun")
            break
        say(f"{item.name} ({left:.0f} s left)")
        record = {"schema": records.SCHEMA, **known, **attempt(item, place, left)}
        append(place.out / records.NAME, record)
        found.append(record)
        say(f"{item.name}: {record['status']}, {record['seconds']:.1f} s")
    return found


def attempt(item: Item, place: Place, left: float) -> dict[str, Any]:
    """Runs one item in at most `left` seconds: its part of the record."""
    started, missing = time.monotonic(), lacks(item, place)
    words = list(item.dry if place.toy else item.words)
    known = {"name": item.name, "words": words}
    if missing:
        return {
            **known,
            "status": "left out",
            "seconds": 0.0,
            "content": None,
            "tail": [f"not there: {', '.join(missing)}"],
        }
    part = place.work / "parts" / item.name
    part.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        out, log = pathlib.Path(folder) / "record.json", pathlib.Path(folder) / "log"
        filled = fill(
            words,
            {
                "out": str(out),
                "part": str(part),
                "runs": str(place.work / "runs"),
                "shared": str(place.shared),
                "data": str(place.shared / "data" / "cifar10"),
                "models": str(place.shared / "models"),
            },
        )
        limit = item.seconds * (PATIENCE if place.toy else 1)
        status = spawn(filled, environment(place, item), log, min(limit, left))
        content, tail = read_content(out), read_tail(log)
    if item.resumes:
        keep_part(part, place.out / f"{item.name}.tar.gz")
    return {
        **known,
        "status": status,
        "seconds": time.monotonic() - started,
        "content": content,
        "tail": None if status == "done" else tail,
    }


def spawn(words: list[str], variables: dict[str, str], log: pathlib.Path, seconds: float) -> str:
    """Runs the interpreter with these words, output to `log`: "done", "failed" or "out of time".

    What is still running then is asked to end, has `GRACE` seconds to save, and is killed.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=units.ROOT,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return "done" if process.wait(seconds) == 0 else "failed"
        except subprocess.TimeoutExpired:
            end(process)
            return "out of time"
        except BaseException:  # Ctrl-C: no process may outlive this one and hold the device
            end(process)
            raise


def end(process: subprocess.Popen) -> None:
    """Ends a process and what it started: politely, then not."""
    for number, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, number)
            process.wait(patience)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def read_content(path: pathlib.Path) -> Any:
    """What the item wrote; None for nothing, its size where it is too large to come back."""
    if not path.exists():
        return None
    if path.stat().st_size > MOST_CONTENT:
        return {"too large, bytes": path.stat().st_size}
    return files.read_json(path)


def read_tail(path: pathlib.Path) -> list[str]:
    """The last lines of an item's output."""
    return [line[:WIDEST] for line in path.read_text(errors="replace").splitlines()[-TAIL:]]


def append(path: pathlib.Path, record: dict[str, Any]) -> None:
    """Adds a line to a JSON-lines file; it is on disk when this returns."""
    with path.open("a") as lines:
        lines.write(json.dumps(files.plain(record)) + "\n")
        lines.flush()
        os.fsync(lines.fileno())


def keep_part(part: pathlib.Path, archive: pathlib.Path) -> None:
    """Packs a folder that a later run goes on with, unless it is more than may come back."""
    if not any(part.iterdir()) or len(list(archive.parent.iterdir())) >= MOST_FILES:
        return
    with tarfile.open(archive, "w:gz") as packed:
        # compiled programs are of this machine alone
        packed.add(part, part.name, filter=lambda entry: None if "/xla" in entry.name else entry)
    if archive.stat().st_size > MOST_BYTES:
        archive.unlink()


def unpack_parts(archives: pathlib.Path, work: pathlib.Path) -> list[str]:
    """Lays what earlier runs brought back where their items look for it."""
    found = sorted(archives.glob("*.tar.gz")) if archives.is_dir() else []
    for archive in found:
        with tarfile.open(archive) as packed:
            packed.extractall(work / "parts", filter="data")
    return [archive.name for archive in found]
