"""Runs some of the tests and records how many passed; what failed is named.

python -m experiments.accelerator.suite --out FILE tests/test_oracles.py …
"""

import argparse
import pathlib
import re
import subprocess
import sys
from typing import Any

from jaxbd import files

KINDS = ("passed", "failed", "skipped", "deselected", "xfailed", "xpassed", "error", "errors")


def counts(text: str) -> dict[str, int]:
    """How many tests ended how, from the last line of pytest's output; empty where there is none.

    >>> counts("==== 2 failed, 31 passed, 1 skipped in 3.10s ====")
    {'failed': 2, 'passed': 31, 'skipped': 1}
    """
    last = [line for line in text.splitlines() if re.search(r" in \d+(\.\d+)?s", line)]
    found = re.findall(r"(\d+) (\w+)", last[-1]) if last else []
    return {kind: int(number) for number, kind in found if kind in KINDS}


def broken(text: str) -> list[str]:
    """Names of the tests that failed, with pytest's word on why."""
    return re.findall(r"^(?:FAILED|ERROR) (.+)$", text, re.MULTILINE)


def run(paths: list[str], *flags: str) -> tuple[int, str]:
    """pytest's exit code and output, which is printed as well."""
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *flags, *paths]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout, flush=True)
    return done.returncode, done.stdout


def summary(code: int, text: str) -> dict[str, Any]:
    """What is recorded of a run."""
    return {"exit_code": code, "counts": counts(text), "broken": broken(text)}


def main() -> int:
    """Writes the record; pytest's exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("paths", nargs="+")
    given = parser.parse_args()
    code, text = run(given.paths)
    files.write_json(given.out, {"tests": given.paths, **summary(code, text)})
    return code


if __name__ == "__main__":
    raise SystemExit(main())
