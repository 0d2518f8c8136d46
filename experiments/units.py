"""Resumable units of work: each result is a JSON file, and a unit whose settings have not changed is not rerun."""

import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import tyro

from jaxbd import record
from jaxbd.base import UserError

RUNS = pathlib.Path(__file__).resolve().parents[1] / "runs"
RESULTS = pathlib.Path(__file__).resolve().parent / "results"
SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared"
"""Where optional real data (CIFAR-10 as parquet, published models) may lie; nothing needs it."""


def cli(main: Callable[..., int | None], prog: str | None = None) -> None:
    """`main` as a command that ends with what it returns; bad input is one line and exit code 2."""
    try:
        sys.exit(tyro.cli(main, prog=prog))
    except UserError as error:
        say(f"{pathlib.Path(sys.argv[0]).stem}: {error}")
        sys.exit(2)


SECONDS: dict[str, float] = {}
"""Wall seconds of every unit asked for by this process, also of those that were kept from an earlier run."""
SETTINGS: dict[str, Any] = {}
"""What each of them depended on, as it was asked for."""


def unit(
    folder: str,
    name: str,
    settings: Any,
    function: Callable[[], dict[str, Any]],
    keep: Callable[[dict[str, Any]], bool] = lambda result: True,
) -> dict[str, Any]:
    """The stored result of this unit, or the function's, stored with its settings, versions and wall seconds.

    A result that `keep` rejects (a failure) is not stored. Results are kept by settings: after a change to the code
    that they depend on, delete the unit's file under `runs/`.
    """
    path = RUNS / folder / f"{name}.json"
    wanted = json.loads(json.dumps(record.plain(settings)))
    SETTINGS[f"{folder}/{name}"] = wanted
    if path.exists():
        stored = record.read_json(path)
        if stored.get("settings") == wanted:
            say(f"{folder}/{name}: kept from an earlier run")
            SECONDS[f"{folder}/{name}"] = stored["seconds"]
            return stored["result"]
    say(f"{folder}/{name}: running")
    started = time.perf_counter()
    result = record.plain(function())
    seconds = time.perf_counter() - started
    SECONDS[f"{folder}/{name}"] = seconds
    if keep(result):
        record.write_json(
            path, {"settings": wanted, "result": result, "seconds": seconds, "versions": record.versions()}
        )
    say(f"{folder}/{name}: {seconds:.0f} s")
    return json.loads(json.dumps(result))


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


def settings_of(config: Any) -> dict[str, Any]:
    """A Config as JSON types."""
    return record.plain(dataclasses.asdict(config))


def use_cache() -> None:
    """Compiled programs are kept between runs."""
    import jax

    jax.config.update("jax_compilation_cache_dir", str(RUNS / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table; floats with four digits."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cell = lambda value: f"{value:.4f}" if isinstance(value, float) else str(value)
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    lines += ["| " + " | ".join(cell(row.get(name, "")) for name in names) + " |" for row in rows]
    return "\n".join(lines)
