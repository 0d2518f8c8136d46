"""`jaxbd scan` of one model as a user runs it: in a process with an empty compile cache, then in a
second one.

python -m experiments.accelerator.scanning --out FILE --model MODEL --data DATA [--once] -- FLAGS

What follows `--` are flags of `jaxbd scan`. Of each process there are the wall seconds, what the
scan says of itself, and where its compile seconds went.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

from experiments.accelerator import compiling
from jaxbd import files

VERDICTS = (0, 1, 3)
"""Exit codes of a scan that came to an end."""
SHOWN = ("verdict", "targets", "decided_by", "seconds", "steps", "cells", "image_steps", "device")
WAYS = ("cold", "warm")


def scan_once(words: list[str], out: pathlib.Path) -> dict[str, Any]:
    """A scan in this process."""
    from jaxbd.cli import main as cli

    listener, started = compiling.Listener(), time.perf_counter()
    code = cli.main(["scan", *words, "--out", str(out)])
    if code not in VERDICTS:
        raise SystemExit(code)
    found = files.read_json(out)
    return {
        "exit_code": code,
        "wall_seconds": time.perf_counter() - started,
        "compiling": listener.read()._asdict(),
        **{name: found[name] for name in SHOWN if name in found},
        "rates": [row["attack_success_rate"] for row in found["classes"]],
    }


def scan_apart(words: list[str], cache: pathlib.Path) -> dict[str, Any]:
    """`scan_once` in a process of its own, whose compiled programs lie in `cache`; its start and
    imports are in `process_seconds`."""
    with tempfile.TemporaryDirectory() as folder:
        record = pathlib.Path(folder) / "record.json"
        module = "experiments.accelerator.scanning"
        command = [sys.executable, "-m", module, "--child", "--out", str(record), "--", *words]
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)}
        started = time.perf_counter()
        subprocess.run(command, check=True, env=environment)
        return {**files.read_json(record), "process_seconds": time.perf_counter() - started}


def main() -> None:
    """Writes the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--once", action="store_true", help="the cold process alone")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("flags", nargs="*")
    given = parser.parse_args()
    if given.child:
        with tempfile.TemporaryDirectory() as folder:
            found = scan_once(given.flags, pathlib.Path(folder) / "scan.json")
        files.write_json(given.out, found)
        return
    words = [given.model, "--data", given.data, *given.flags]
    with tempfile.TemporaryDirectory() as folder:
        ways = WAYS[:1] if given.once else WAYS
        found = {way: scan_apart(words, pathlib.Path(folder) / "xla") for way in ways}
    name = pathlib.Path(given.model).name
    files.write_json(given.out, {"model": name, "flags": given.flags, **found})


if __name__ == "__main__":
    main()
