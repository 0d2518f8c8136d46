"""Runs the differential fuzzing in parts, each in a process of its own and kept in `runs/reader/`.

    python -m experiments.reader.fuzz --files 1000000

An interrupted run goes on where it stopped: finished parts are not run again. A process that dies
(a crash of a reader, or of PyTorch on a file that jaxbd accepted) is a result too.
"""

import pathlib
import random
import signal
import subprocess
import sys
import time
from typing import Any

from experiments import units
from experiments.reader import nursery

ROOT = pathlib.Path(__file__).resolve().parents[2]
SIZE = 5_000
SHARES = {"zip": 0.5, "stream": 0.25, "safetensors": 0.25}
"""Kind of file -> share of all files."""
RARER = ("wrapped", "onnx", "pt2")
"""Kinds that join where the package has readers of them, each with a hundredth as many files more:
the judges of most take milliseconds for each."""
MOST_SECONDS = 3_600
NURSERY = nursery.Nursery()


def plan(files: int) -> list[tuple[str, int, int]]:
    """(kind, first, count) of every part, the kinds in turn so that an unfinished run has all."""
    rows = []
    rarer = {kind: 0.01 for kind in RARER if kind in available()}
    for kind, share in {**SHARES, **rarer}.items():
        total = int(files * share)
        for index, first in enumerate(range(0, total, SIZE)):
            rows.append(((index + 0.5) / share, kind, first, min(SIZE, total - first)))
    return [row[1:] for row in sorted(rows)]


def available() -> set[str]:
    """Kinds of files that can be fuzzed here."""
    from experiments.reader.targets import TARGETS

    return set(TARGETS)


def run_part(kind: str, first: int, count: int) -> dict[str, Any]:
    """One part in a process of its own, with the imports of `NURSERY`."""
    started = time.perf_counter()
    result = NURSERY.run(kind, first, count, MOST_SECONDS)
    if "died" not in result:
        return result
    died = [[first, f"the process ended with {result['died']}: {NURSERY.complaints()}"]]
    seconds = time.perf_counter() - started
    return {
        "kind": kind,
        "first": first,
        "files": 0,
        "refused": 0,
        "equal": 0,
        "unequal": [],
        "crashed": died,
        "hung": [],
        "executed": [],
        "slowest_ms": 0.0,
        "megabytes": 0.0,
        "outcomes": "",
        "wall_seconds": seconds,
        "readers": "",
    }


def _start(kind: str, first: int, count: int) -> subprocess.Popen:
    words = [sys.executable, "-W", "ignore", "-m", "experiments.reader.part", kind]
    return subprocess.Popen(
        [*words, str(first), str(count)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finished(kind: str, first: int, count: int) -> bool:
    """Whether the part was run before."""
    return (units.RUNS / "reader" / f"{kind}-{first}.json").exists()


def unit(kind: str, first: int, count: int) -> dict[str, Any]:
    """The part's result, kept from an earlier run where there is one."""
    return units.unit(
        "reader",
        f"{kind}-{first}",
        [kind, first, count],
        lambda: run_part(kind, first, count),
    )


def kills(count: int, files: int = 200) -> dict[str, int]:
    """Kills a part `count` times at a random moment, runs it again each time, and compares the
    outcomes with those of a run that nobody disturbed."""
    rng, survived = random.Random(0), 0
    kinds = list(SHARES)
    for number in range(count):
        kind, first = kinds[number % len(kinds)], 10_000_000 + number * files
        process = _start(kind, first, files)
        time.sleep(rng.uniform(0.1, 4.0))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        again, alone = run_part(kind, first, files), run_part(kind, first, files)
        survived += again["outcomes"] == alone["outcomes"] != "" and not again["crashed"]
    return {"kills": count, "survived": survived}


def total(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """All parts of one kind, or of all kinds, in one line."""
    return {
        "files": sum(part["files"] for part in parts),
        "refused": sum(part["refused"] for part in parts),
        "read, equal elsewhere": sum(part["equal"] for part in parts),
        "unequal": sum(len(part["unequal"]) for part in parts),
        "crashed": sum(len(part["crashed"]) for part in parts),
        "hung": sum(len(part["hung"]) for part in parts),
        "executed": sum(len(part["executed"]) for part in parts),
        "slowest ms": max(part["slowest_ms"] for part in parts),
        "most MB": max(part["megabytes"] for part in parts),
    }


def main(files: int = 1_000_000) -> int:
    """Runs what is missing of `files` files; 1 where anything was unequal, crashed, hung or ran.

    Args:
      files: how many in all, of every kind together.
    """
    parts = [unit(*part) for part in plan(files)]
    row = total(parts)
    print(units.table([row]))
    return int(any(row[bad] for bad in ("unequal", "crashed", "hung", "executed")))


if __name__ == "__main__":
    units.cli(main, "experiments.reader.fuzz")
