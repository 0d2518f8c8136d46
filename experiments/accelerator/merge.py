"""Puts records that came back among the committed results, one file each.

Refused are records of other code than this, and those of a CPU or at toy size, unless they are
asked for. A record replaces an earlier one, but a failure never replaces a success.
"""

import pathlib
import shutil
from typing import Any

from experiments.accelerator import records
from experiments.accelerator.queue import Item
from jaxbd import files
from jaxbd.base import UserError


def merge(
    came: pathlib.Path,
    results: pathlib.Path,
    items: list[Item],
    code: str,
    parts: pathlib.Path | None = None,
    allow_cpu: bool = False,
) -> list[str]:
    """Validates all records of the folder `came` first, then writes them to `results`, and their
    parts to `parts`.

    Args:
      code: hash that the records must have, see `records.code_hash`.
    Returns: the names of the records that were written.
    Raises: UserError, before anything is written, for a record that is refused.
    """
    path = came / records.NAME
    if not path.is_file():
        raise UserError(f"{came} has no {records.NAME}; give the folder that --out named")
    found, names = records.read_lines(path), {item.name for item in items}
    for record in found:
        refuse(record, names, code, allow_cpu)
    before, written = records.committed(results), []
    for record in latest(found):
        if record["status"] == "left out" or worse(record, before.get(record["name"])):
            continue
        files.write_json(results / f"{record['name']}.json", record)
        written.append(record["name"])
    if parts is not None:
        parts.mkdir(parents=True, exist_ok=True)
        for archive in sorted(came.glob("*.tar.gz")):
            shutil.copy(archive, parts / archive.name)
    return written


def refuse(record: dict[str, Any], names: set[str], code: str, allow_cpu: bool) -> None:
    """Raises UserError for a record that does not belong among the results."""
    name = record["name"]
    if name not in names:
        raise UserError(f"record {name!r} is of no item of the queue; was it renamed?")
    if record["code"] != code:
        raise UserError(
            f"record {name!r} was made by code {record['code']}, this is {code}; check out what"
            f" made it, or give --code {record['code']} to take it as it is"
        )
    if not records.is_of_accelerator(record) and not allow_cpu:
        size = "at toy size" if record["toy"] else "at full size"
        raise UserError(
            f"record {name!r} is of a {record['backend']} {size}; only accelerators' are results,"
            " give --allow-cpu to take it all the same"
        )


def latest(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One record of each name: the last that was done, else the last."""
    best: dict[str, dict[str, Any]] = {}
    for record in found:
        if not worse(record, best.get(record["name"])):
            best[record["name"]] = record
    return list(best.values())


def worse(record: dict[str, Any], other: dict[str, Any] | None) -> bool:
    """Whether `other` is a success and `record` is none."""
    return other is not None and other["status"] == "done" and record["status"] != "done"
