"""Inputs that once failed: each script of `shared/cases` makes its own and asks jaxbd of them."""

import hashlib
import os
import re
import subprocess
import sys
import tempfile
from typing import Any

from experiments import units
from experiments.reproduce import Check
from jaxbd.base import UserError

SCRIPTS = ("hostile", "runs", "datasets", "checkpoints")
SUMMARY = re.compile(r"^(\d+) of (\d+) answers are right$", re.M)


def run(quick: bool) -> tuple[dict[str, Any], list[Check]]:
    """(tables, checks)."""
    if not (units.SHARED / "cases").is_dir():
        units.say("shared/cases is not beside the repository: its table is left out")
        row = {"script": "left out: shared/cases is not beside the repository"}
        return {"Cases: answers of jaxbd": [row]}, []
    scripts = SCRIPTS[:1] if quick else SCRIPTS
    found = [_asked(name) for name in scripts]
    rows = [row for row in found if row]
    if not rows:
        return {}, []
    checks = [
        Check(f"cases of {row['script']}: not right", row["cases"] - row["right"], 0, "exactly")
        for row in rows
    ]
    shown = [{k: v for k, v in row.items() if k != "not right"} for row in rows]
    tables: dict[str, Any] = {"Cases: answers of jaxbd": shown}
    wrong = [{"script": row["script"], **one} for row in rows for one in row["not right"]]
    if wrong:
        tables["Cases: answers that are not right"] = wrong
    return tables, checks


def _asked(name: str) -> dict[str, Any] | None:
    text = (units.SHARED / "cases" / f"{name}.py").read_bytes()
    settings = [name, hashlib.sha256(text).hexdigest()]
    return units.kept_or_none("import", f"cases-{name}", settings, lambda: ask(name))


def ask(name: str) -> dict[str, Any]:
    """A script's own `--try`: how many answers it calls right, and which not."""
    script = units.SHARED / "cases" / f"{name}.py"
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPATH": str(units.ROOT), "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(
            [sys.executable, "-W", "ignore", str(script), folder, "--try"],
            cwd=units.ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
    return read(name, done.stdout, done.stderr)


def read(name: str, text: str, errors: str = "") -> dict[str, Any]:
    """What a script printed, as a row."""
    summary = SUMMARY.search(text)
    if summary is None:
        last = (errors.strip() or text.strip() or "nothing").splitlines()[-1]
        raise UserError(f"shared/cases/{name}.py did not finish: {last}")
    right, cases = int(summary[1]), int(summary[2])
    return {"script": name, "cases": cases, "right": right, "not right": _wrong(text)}


def _wrong(text: str) -> list[dict[str, str]]:
    """The cases that the script calls `NOT YET`: the file, and why."""
    path, found = "", []
    for line in text.splitlines():
        if line.startswith("        NOT YET: "):
            found.append({"case": path, "why": line.strip()[len("NOT YET: ") :].replace("|", "/")})
        elif line.startswith("    ") and not line.startswith("        "):
            path = line.strip().replace("|", "/")
    return found
