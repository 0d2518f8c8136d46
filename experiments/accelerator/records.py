"""What a record of the queue says, and what it was made by: the sources' hash."""

import hashlib
import json
import pathlib
from typing import Any

from experiments import units
from jaxbd import files
from jaxbd.base import UserError

SCHEMA = "jaxbd/1/accelerator"
NAME = "records.jsonl"
STATUS = ("done", "failed", "out of time", "left out")
RESULTS = units.RESULTS / "accelerator"
SOURCES = ("jaxbd/**/*.py", "experiments/**/*.py", "scripts/*.py", "tests/**/*.py")
FIELDS = {
    "schema": str,
    "name": str,
    "status": str,
    "words": list,
    "seconds": float,
    "code": str,
    "backend": str,
    "device": str,
    "versions": dict,
    "toy": bool,
}
"""Field -> type. `content` is the item's own JSON, or None; `tail` its last lines, or None."""


def code_hash(root: pathlib.Path = units.ROOT) -> str:
    """Of names and contents of all Python sources; figures of other code are other figures."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in SOURCES for path in root.glob(pattern)}):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file; a last line that was cut off is left out.

    Raises: UserError naming any other line that is no record.
    """
    lines = path.read_text(errors="replace").splitlines()
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(checked(json.loads(line)))
        except ValueError:
            if number < len(lines):
                raise UserError(f"{path.name}, line {number} is no JSON; remove it") from None
    return found


def checked(record: Any) -> dict[str, Any]:
    """`record`. Raises: UserError when it is not one of the queue's."""
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise UserError(f"a record of schema {SCHEMA} was expected, got {str(record)[:80]!r}")
    wrong = [name for name, kind in FIELDS.items() if not isinstance(record.get(name), kind)]
    if wrong or record["status"] not in STATUS:
        wrong = ", ".join(wrong) or f"status {record['status']!r}"
        raise UserError(f"record {record.get('name')!r} is damaged: {wrong}")
    return record


def committed(folder: pathlib.Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Name -> record, of those among the results."""
    if not folder.is_dir():
        return {}
    found = (checked(files.read_json(path)) for path in sorted(folder.glob("*.json")))
    return {record["name"]: record for record in found}


def is_of_accelerator(record: dict[str, Any]) -> bool:
    """Whether it was measured on something else than a CPU, at full size."""
    return record["backend"] not in ("cpu", "none") and not record["toy"]
