"""Result units: one JSON file each under `experiments/results/units/`, committed, from any machine.

A unit's `work` is the hash of its settings and of the code that decides its result. The code is
that of the modules it names and of everything they import from jaxbd's attacks, repairs, inversion,
detection, training, metrics, models and pipelines, from `data.draw`, `images`, `losses` and `base`,
and from this folder. Comments and docstrings do not count; neither do readers of files, saving,
reports or the command line. A unit's `key` adds device and versions, so units of two machines lie
in two files. Nothing is overwritten: a second result of one key gets a number.
"""

import functools
import json
import os
import pathlib
import platform
import re
from typing import Any, NamedTuple

from experiments import units
from experiments.papers.source_code import code_hash, digest
from jaxbd import files
from jaxbd.base import UserError

SCHEMA = "jaxbd-unit/1"
FILE = re.compile(r"(.+)-[0-9a-f]{12}(?:-\d+)?\.json")
"""Name, key, and where there is more than one result of a key, its number."""


class Unit(NamedTuple):
    """What is to be measured.

    Attributes:
      folder: below `experiments/results/units/`, such as "small/defence".
      name: first part of the file's name.
      settings: everything the result depends on, as JSON types.
      modules: whose code decides the result.
      without: modules that it does not depend on, though those import them.
    """

    folder: str
    name: str
    settings: dict[str, Any]
    modules: tuple[str, ...]
    without: tuple[str, ...] = ()


class Stored(NamedTuple):
    """A unit that was measured: its result, the whole record, and whether other code made it."""

    result: dict[str, Any]
    record: dict[str, Any]
    is_older: bool


def root() -> pathlib.Path:
    """Where units lie."""
    return units.RESULTS / "units"


def work(unit: Unit) -> str:
    """The hash [12 hex digits] of a unit's settings and code.

    Raises: ValueError for a module named `__main__`, which is another one each time.
    """
    if "__main__" in unit.modules:
        raise ValueError(f"{unit.name}: name the module itself; __main__ has no code of its own")
    return digest(settings_hash(unit), code_hash(unit.modules, unit.without))


def settings_hash(unit: Unit) -> str:
    """The hash of a unit's settings without those that are None, so that units stay known when a
    setting is added that changes nothing by default."""
    stated = {name: value for name, value in unit.settings.items() if value is not None}
    return digest(json.dumps(files.plain(stated), sort_keys=True))


def key(unit: Unit, machine: dict[str, Any]) -> str:
    """The hash [12 hex digits] of a unit's work on a machine."""
    return digest(work(unit), json.dumps(machine, sort_keys=True))


@functools.cache
def this_machine() -> dict[str, Any]:
    """Device in words, processor and versions of this process."""
    return {"device": files.device(), "processor": _processor(), "versions": files.versions()}


def _processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def find(unit: Unit) -> Stored | None:
    """The unit as some machine measured it; made by today's code where there is such a one."""
    found = _stored(unit)
    current = [each for each in found if not each.is_older]
    return (current or found or [None])[0]


def has_current(unit: Unit) -> bool:
    """Whether some machine measured the unit with today's code."""
    stored = find(unit)
    return stored is not None and not stored.is_older


def _stored(unit: Unit) -> list[Stored]:
    """Every file of the unit's settings, in order of their names."""
    folder, wanted, found = root() / unit.folder, settings_hash(unit), []
    if not folder.is_dir():
        return []
    for path in _index(folder, os.stat(folder).st_mtime_ns).get(unit.name, ()):
        record = _read(path, os.stat(path).st_mtime_ns)
        if record["settings_hash"] == wanted:
            found.append(Stored(record["result"], record, record["work"] != work(unit)))
    return found


@functools.lru_cache(16)
def _index(folder: pathlib.Path, modified: int) -> dict[str, list[pathlib.Path]]:
    """Name -> its files, in order."""
    del modified
    found: dict[str, list[pathlib.Path]] = {}
    for path in sorted(folder.glob("*.json")):
        if match := FILE.fullmatch(path.name):
            found.setdefault(match[1], []).append(path)
    return found


@functools.cache
def _read(path: pathlib.Path, modified: int) -> dict[str, Any]:
    """A stored unit. Raises: UserError when the file is not one."""
    del modified
    record = files.read_json(path)
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise UserError(f"{path.name} is not a result unit ({SCHEMA}); delete it")
    return record


def write(unit: Unit, result: dict[str, Any], seconds: float) -> pathlib.Path:
    """Stores a result with settings, code, machine and wall seconds; whole or not at all."""
    machine, own = this_machine(), key(unit, this_machine())
    folder = root() / unit.folder
    path, number = folder / f"{unit.name}-{own}.json", 1
    while path.exists():
        number += 1
        path = folder / f"{unit.name}-{own}-{number}.json"
    record = {
        "schema": SCHEMA,
        "name": unit.name,
        "key": own,
        "work": work(unit),
        "settings_hash": settings_hash(unit),
        "settings": unit.settings,
        "modules": list(unit.modules),
        "result": result,
        "seconds": seconds,
        **machine,
    }
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(path, record)
    return path
