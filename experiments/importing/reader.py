"""Hostile and mutated files, and round trips through PyTorch."""

import importlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import xml.etree.ElementTree
from typing import Any

from experiments import units
from experiments.reproduce import Check

TITLE = "Reader: hostile files, mutated files, round trips"


def run(quick: bool) -> tuple[dict[str, Any], list[Check]]:
    """(tables, checks)."""
    corpus = units.kept_or_none("import", "hostile", "corpus", read_hostile, keep=_passed)
    found = [corpus, *(suite(*one, quick) for one in SUITES)]
    rows = [row for row in found if row]
    checks = [Check(f"{row['what']}: failures", row["failed"], 0, "exactly") for row in rows]
    # a suite of which nothing ran has no failures either
    checks += [
        Check(f"{row['what']}: cases", row["cases"], _least(row, quick), "at least") for row in rows
    ]
    if corpus:
        seconds, megabytes = corpus["slowest seconds"], corpus["largest MB"]
        checks.append(Check("slowest refusal in seconds", seconds, 2.0, "at most"))
        checks.append(Check("largest refusal in MB", megabytes, 200.0, "at most"))
    return ({TITLE: rows} if rows else {}), checks


def read_hostile() -> dict[str, Any]:
    """Every file of the hostile corpus read in a watched process: what became of it, at what
    cost."""
    sys.path.insert(0, str(units.ROOT / "tests"))
    corpus: Any = importlib.import_module("hostile")
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        names = corpus.build(root)
        environment = {**os.environ, "PYTHONPATH": str(units.ROOT), "JAX_PLATFORMS": "cpu"}
        command = [
            sys.executable,
            "-W",
            "ignore",
            str(units.ROOT / "tests" / "hostile.py"),
            folder,
        ]
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=True
        )
        reports = [json.loads(line) for line in done.stdout.splitlines()]
        left = sorted(entry.name for entry in root.iterdir())
    # beside good weights, what is inert is left out and the weights are read
    right = lambda name: "accepted" if name in corpus.INERT else "refused"
    bad = [r["name"] for r in reports if r["outcome"] != right(r["name"]) or r["events"]]
    bad += sorted(set(names) - {r["name"] for r in reports}) + sorted(set(left) ^ set(names))
    return {
        "what": "hostile files refused, or read without what is inert; nothing run or written",
        "cases": len(reports),
        "failed": len(bad),
        "slowest seconds": max(r["seconds"] for r in reports),
        "largest MB": max(r["megabytes"] for r in reports),
    }


def hostile() -> dict[str, Any]:
    """The same as a unit."""
    return units.unit("import", "hostile", "corpus", read_hostile, keep=_passed)


def _passed(result: dict[str, Any]) -> bool:
    return not result["failed"]


MUTATED = 20_000
PARITY = (
    "tests/interop/test_layouts.py tests/models/test_models.py tests/interop/test_round_trip.py"
)
SUITES = (
    (
        "mutated files read or refused cleanly",
        "tests/interop/test_fuzz_reader.py",
        "many_mutated",
        "mutated_files",
    ),
    ("file round trips through PyTorch", "tests/interop/test_container.py", "", ""),
    (
        "logits and round trips per architecture against PyTorch",
        PARITY,
        "",
        "",
    ),
)
"""(what, files, tests of a full run, tests of a quick one): chosen by pytest's -k."""


def suite(what: str, files: str, full: str, fast: str, quick: bool) -> dict[str, Any] | None:
    """A part of the test suite as a figure: test cases and failures."""
    chosen = fast if quick else full

    def work() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            report = pathlib.Path(folder) / "report.xml"
            command = [sys.executable, "-m", "pytest", "-q", *files.split(), f"--junitxml={report}"]
            command += ["-k", chosen] if chosen else []
            command += [] if quick else ["--slow"]
            subprocess.run(command, cwd=units.ROOT, check=False, stdout=sys.stderr)
            found = xml.etree.ElementTree.parse(report).getroot().find("testsuite")
            cases: dict[str, str] = {} if found is None else found.attrib
        failed = int(cases["failures"]) + int(cases["errors"])
        ran = int(cases["tests"]) - int(cases["skipped"])
        return {"what": what, "cases": ran * _each(files, quick), "failed": failed}

    name = f"suite-{pathlib.Path(files.split()[0]).stem}{'-quick' if quick else ''}"
    return units.kept_or_none("import", name, [files, chosen, quick], work, keep=_passed)


def _least(row: dict[str, Any], quick: bool) -> int:
    """How many cases a part must have had: 20,000 mutated files are stated for a full run."""
    return MUTATED if row["what"] == SUITES[0][0] and not quick else 1


def _each(files: str, quick: bool) -> int:
    """Inputs behind one test case: each fuzzing test tries many."""
    if "fuzz" not in files:
        return 1
    sys.path[:0] = [str(units.ROOT / "tests"), str(units.ROOT / "tests" / "interop")]
    fuzz: Any = importlib.import_module("test_fuzz_reader")
    return fuzz.QUICK if quick else fuzz.SLOW
