"""`./scripts/matrix`: the suite on several Pythons, and the record of what passed where.

Each Python runs `./scripts/test` in an environment of its own: 3.11 with the pinned releases, newer
ones with the newest. The record is `experiments/results/matrix.json`; a Python that is not named
keeps its row.
"""

import argparse
import json
import pathlib
import re
import subprocess
import sys
import time
from typing import Any

from experiments import units
from experiments.accelerator import suite
from jaxbd import files

RESULT = units.RESULTS / "matrix.json"
PYTHONS = ("3.11", "3.12", "3.13")
PINNED = "3.11"
"""Whose releases `scripts/constraints.txt` pins; its environment is `.venv`."""
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "torch")
VERSIONS = f"""
import importlib.metadata, json, platform
print(json.dumps({{"python": platform.python_version(),
    **{{name: importlib.metadata.version(name) for name in {PACKAGES!r}}}}}))
"""


def interpreter(version: str) -> pathlib.Path:
    """Of the environment that `scripts/test` makes."""
    return units.ROOT / (".venv" if version == PINNED else f".venv-{version}") / "bin" / "python"


def run(version: str, words: list[str]) -> dict[str, Any]:
    """The suite, or the tests of `words`, on one Python: its row."""
    command = ["./scripts/test", *([] if version == PINNED else ["--python", version]), *words]
    started = time.perf_counter()
    done = subprocess.Popen(
        command, cwd=units.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.stdout is not None
    lines = []
    for line in done.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    code = done.wait()
    return row(version, words, code, "".join(lines)) | {"seconds": time.perf_counter() - started}


def row(version: str, words: list[str], code: int, text: str) -> dict[str, Any]:
    """What is recorded of a run's output."""
    counted = suite.counts(text)
    found: dict[str, Any] = {
        "python": version,
        "tests": " ".join(words) or "all",
        "releases": "pinned" if version == PINNED else "newest",
        "exit_code": code,
        "passed": counted.get("passed", 0),
        "failed": counted.get("failed", 0) + counted.get("error", 0) + counted.get("errors", 0),
        "skipped": counted.get("skipped", 0),
        "broken": suite.broken(text),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    python = interpreter(version)
    if python.exists():
        told = subprocess.run([python, "-c", VERSIONS], capture_output=True, check=True, text=True)
        found["versions"] = json.loads(told.stdout)
    return found


def merged(rows: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`rows` with those of `new` in place of the same Pythons', oldest Python first."""
    every = {each["python"]: each for each in [*rows, *new]}
    order = lambda version: [int(part) for part in re.findall(r"\d+", version)]
    return [every[version] for version in sorted(every, key=order)]


def main(argv: list[str] | None = None) -> int:
    """Runs the suites, prints the table, writes the record; 1 where a test failed."""
    parser = argparse.ArgumentParser(prog="./scripts/matrix", description=__doc__)
    parser.add_argument("--python", nargs="+", default=list(PYTHONS), metavar="VERSION")
    parser.add_argument("tests", nargs="*", help="these tests alone; they count in no other row")
    given, words = parser.parse_known_args(argv)
    rows = [run(version, [*given.tests, *words]) for version in given.python]
    stored = files.read_json(RESULT)["rows"] if RESULT.exists() else []
    every = merged(stored, rows)
    files.write_json(RESULT, {"schema": "jaxbd/1/matrix", "rows": every})
    shown = ("python", "releases", "tests", "passed", "failed", "skipped")
    jax = [{"jax": each.get("versions", {}).get("jax", "")} for each in every]
    pairs = zip(every, jax, strict=True)
    print(units.table([{**{name: each[name] for name in shown}, **own} for each, own in pairs]))
    return int(any(each["exit_code"] for each in rows))


if __name__ == "__main__":
    sys.exit(main())
