"""How long one waits before anything happens: `jaxbd --help`, and a compiled program in a second
process.

python -m experiments.scale.startup
"""

import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time

from experiments import units

HELP = [sys.executable, "-m", "jaxbd", "--help"]
PROGRAM = """
import json, jax
from jaxbd.base import Batch
from jaxbd.cli import common
from jaxbd.data import draw
from jaxbd.inversion import mesa
from jaxbd.models import build
from jaxbd.training import sweep
from jaxbd.training.run import Run
import jax.numpy as jnp
common.start()
net = build.net(build.Spec(arch={arch!r}, classes=10, image_shape=(8, 8, 3), options={options!r}))
data = Batch(jnp.zeros((32, 8, 8, 3)), jnp.arange(32) % 10)
task = mesa.make(net, (8, 8, 3), mesa.Config(hidden=64)), draw.uniform(8), data
key, victim = jax.random.key(0), net.frozen(net.init(jax.random.key(0)))
cells = sweep.grid(range(10))
found = sweep.search(Run(), "sweep", key, *task, cells, victim, num_steps=2, slots=10)
print(json.dumps(found.seconds._asdict()))
"""
"""What a process of the second experiment does: a short sweep with the command line's compile
cache."""


def run(repeats: int = 5, quick: bool = False) -> dict:
    """Rows of both tables; wall seconds on this machine as it is, so no result of an
    earlier run is used."""
    units.say("start-up: --help, and one sweep in two processes")
    with tempfile.TemporaryDirectory() as folder:
        cold = {"PYTHONPYCACHEPREFIX": str(pathlib.Path(folder) / "bytecode")}
        first = [_seconds(HELP, cold)]
        later = [_seconds(HELP, cold) for _ in range(repeats)]
        compiled = _two_processes(pathlib.Path(folder) / "xla", quick)
    names = {
        "jaxbd --help, first run, no bytecode yet": first,
        f"jaxbd --help, median of {repeats} more": later,
    }
    rows = [
        {
            "process": name,
            "seconds": statistics.median(wall),
            "of them at work": statistics.median(work),
        }
        for name, (wall, work) in ((name, zip(*runs, strict=True)) for name, runs in names.items())
    ]
    return {"rows": rows, "compile": compiled}


def _seconds(words: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Wall seconds of a process, and those that it had a core for."""
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        words,
        cwd=units.ROOT,
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, **environment},
    )
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _two_processes(cache: pathlib.Path, quick: bool) -> list[dict]:
    """The same sweep in two processes, one after the other, with an empty compile cache at
    first."""
    arch, options = ("cnn", {"width": 4, "stages": 1}) if quick else ("wrn16-1", {})
    code, rows = PROGRAM.format(arch=arch, options=options), []
    for name in ("first process, empty compile cache", "second process"):
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)}
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=units.ROOT,
            check=True,
            capture_output=True,
            text=True,
            env=environment,
        )
        spent = json.loads(done.stdout.splitlines()[-1])
        whole = time.perf_counter() - started
        rows.append(
            {
                "process": name,
                "net": arch,
                "seconds compiling": spent["compile"],
                "seconds in all": whole,
            }
        )
    return rows


def main(smoke: bool = False) -> None:
    """Prints both tables."""
    found = run(quick=smoke)
    print(units.table(found["rows"]))
    print(f"\n{units.table(found['compile'])}")


if __name__ == "__main__":
    units.cli(main)
