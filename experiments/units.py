"""Resumable units of work: each result is a JSON file, and a unit whose settings have not changed
is not rerun.
"""

import dataclasses
import importlib
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

from jaxbd import files
from jaxbd.base import UserError
from jaxbd.training.run import Run

ROOT = pathlib.Path(__file__).resolve().parents[1]
RUNS = ROOT / "runs"
RESULTS = ROOT / "experiments" / "results"
SCRIPTS = ROOT / "scripts"
SHARED = pathlib.Path(os.environ.get("JAXBD_SHARED", ROOT.parent / "shared"))
"""Where optional real data (CIFAR-10 as parquet, published models) may lie; nothing needs it. By
default the folder `shared` beside the repository."""


def cli(main: Callable[..., int | None], prog: str | None = None) -> None:
    """`main` as a command that ends with what it returns; bad input is one line and exit code 2."""
    import tyro  # a machine that only runs parts of the queue may lack it

    try:
        sys.exit(tyro.cli(main, prog=prog))
    except UserError as error:
        say(f"{pathlib.Path(sys.argv[0]).stem}: {error}")
        sys.exit(2)


SECONDS: dict[str, float] = {}
"""Wall seconds of every unit asked for by this process, also of those found from an earlier run."""
SETTINGS: dict[str, Any] = {}
"""What each of them depended on, as it was asked for."""


def unit(
    folder: str,
    name: str,
    settings: Any,
    function: Callable[[], dict[str, Any]],
    keep: Callable[[dict[str, Any]], bool] = lambda result: True,
) -> dict[str, Any]:
    """The stored result of this unit, or the function's, stored with its settings, versions and
    wall seconds.

    A result that `keep` rejects (a failure) is not stored. Stored results are found by their
    settings alone: after a change to the code that they depend on, delete the unit's file under
    `runs/`.
    """
    path = RUNS / folder / f"{name}.json"
    wanted = json.loads(json.dumps(files.plain(settings)))
    SETTINGS[f"{folder}/{name}"] = wanted
    if path.exists():
        stored = files.read_json(path)
        if stored.get("settings") == wanted:
            say(f"{folder}/{name}: found from an earlier run")
            SECONDS[f"{folder}/{name}"] = stored["seconds"]
            return stored["result"]
    say(f"{folder}/{name}: running")
    started = time.perf_counter()
    result = files.plain(function())
    seconds = time.perf_counter() - started
    SECONDS[f"{folder}/{name}"] = seconds
    if keep(result):
        files.write_json(
            path,
            {
                "settings": wanted,
                "result": result,
                "seconds": seconds,
                "versions": files.versions(),
            },
        )
    say(f"{folder}/{name}: {seconds:.0f} s")
    return json.loads(json.dumps(result))


KEPT_ONLY = [False]
"""Whether only stored results are taken and no unit runs, see `kept_or_none`."""
MISSING: list[str] = []
"""Units that were asked for, were not stored, and did not run."""


def kept_or_none(
    folder: str,
    name: str,
    settings: Any,
    function: Callable[[], dict[str, Any]],
    keep: Callable[[dict[str, Any]], bool] = lambda result: True,
) -> dict[str, Any] | None:
    """`unit`, or None where only stored results are taken and this is not one of them."""
    path = RUNS / folder / f"{name}.json"
    wanted = json.loads(json.dumps(files.plain(settings)))
    if KEPT_ONLY[0] and not (path.exists() and files.read_json(path).get("settings") == wanted):
        miss(folder, name)
        return None
    return unit(folder, name, settings, function, keep)


def miss(folder: str, name: str) -> None:
    """Names a unit as missing, once."""
    if f"{folder}/{name}" not in MISSING:
        MISSING.append(f"{folder}/{name}")


def say(text: str) -> None:
    """Progress on stderr."""
    print(text, file=sys.stderr, flush=True)


def progress(folder: str) -> Callable[[str, int, int], None]:
    """A progress callback that prints a line every ten seconds."""
    last = [0.0]

    def report(label: str, done: int, total: int) -> None:
        if done == total or time.monotonic() - last[0] > 10:
            last[0] = time.monotonic()
            say(f"  {folder}: {label} {done}/{total}")

    return report


def start_run(folder: str) -> Run:
    """A run that reports progress on stderr and saves nothing: units are what is resumed."""
    return Run(progress=progress(folder))


def script(name: str) -> Any:
    """A file of `scripts/` as a module; what it imports lies beside it."""
    if str(SCRIPTS) not in sys.path:
        sys.path.insert(0, str(SCRIPTS))
    return importlib.import_module(name)


def settings_of(config: Any) -> dict[str, Any]:
    """A Config as JSON types."""
    return files.plain(dataclasses.asdict(config))


def scan_settings() -> dict[str, Any]:
    """The settings of `jaxbd scan` where no flag says otherwise."""
    from jaxbd.pipelines import scan

    return settings_of(scan.PRESETS["quick"])


def environment() -> dict[str, str]:
    """The environment of a process that runs this checkout's `jaxbd`."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def use_cache() -> None:
    """Stores compiled programs under `runs/` for later processes."""
    import jax

    jax.config.update("jax_compilation_cache_dir", str(RUNS / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table; floats with four digits."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    lines += ["| " + " | ".join(_cell(row.get(name, "")) for name in names) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
