"""9,900 cells in bounded memory: every ordered pair of 100 classes, on a small net.

Neural Cleanse for all pairs through `sweep.search`: slots of one compiled program, as many as the
memory budget holds by the program's own account. What cells became lies in the host's memory. The
peak of the process says the rest.

    python -m experiments.scale.many_cells
    python -m experiments.scale.many_cells --smoke
"""

import pathlib
import resource
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from experiments import units
from jaxbd import files
from jaxbd.base import Batch, Net
from jaxbd.data import draw
from jaxbd.inversion import neural_cleanse
from jaxbd.models import build
from jaxbd.training import sweep
from jaxbd.training.run import Run

NAME = "scale/many-cells"
CLASSES, STEPS, BUDGET = 100, 20, 16 << 20
"""Classes, of which all ordered pairs are searched; steps of each; bytes for the compiled
program."""
SHAPE, BATCH = (8, 8, 1), 8
MEGA = 1e6


def peak() -> int:
    """Bytes that this process has had in memory at most, its arrays and compiled programs
    included."""
    status = pathlib.Path("/proc/self/status")
    if (
        status.exists()
    ):  # what getrusage says on Linux starts at the peak of the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def sweep_pairs(classes: int, steps: int, budget: int) -> dict:
    """The search in this process: cells, slots, what they took of time and memory."""
    net, data = _task(classes)
    victim = net.init(jax.random.key(0))
    victim = victim if net.frozen is None else net.frozen(victim)
    cells = sweep.grid(range(classes), source=range(classes))
    inversion = neural_cleanse.make(net, SHAPE, neural_cleanse.for_pairs())
    report, before, started = units.progress(NAME), peak(), time.perf_counter()
    found = sweep.search(
        Run(),
        "all pairs",
        jax.random.key(1),
        inversion,
        draw.uniform(BATCH),
        data,
        cells,
        victim,
        num_steps=steps,
        slots=1024,
        memory_budget=budget,
        chunk=steps,
        on_chunk=lambda at: report("cells", at.cells, at.cells_total),
    )
    results = sum(leaf.nbytes for leaf in jax.tree.leaves((found.states, found.infos)))
    return {
        "cells": sweep.size(cells),
        "steps of each": steps,
        "slots": found.slots,
        "all done": bool((found.steps == steps).all()),
        "budget MB": budget / MEGA,
        "results MB": results / MEGA,
        "peak MB before": before / MEGA,
        "peak MB": peak() / MEGA,
        "seconds": time.perf_counter() - started,
        "of them compiling": found.seconds.compile,
    }


def _task(classes: int) -> tuple[Net, Batch]:
    """A small net, and four random images of each class."""
    options = {"width": 4, "stages": 2}
    spec = build.Spec(arch="cnn", classes=classes, image_shape=SHAPE, options=options)
    images = np.random.default_rng(0).integers(0, 256, (4 * classes, *SHAPE), np.uint8)
    labels = np.arange(4 * classes) % classes
    return build.net(spec), Batch(jnp.asarray(images), jnp.asarray(labels, jnp.int32))


def run(classes: int = CLASSES, steps: int = STEPS, budget: int = BUDGET) -> dict:
    """Resumable; in a process of its own, whose peak is that of this search."""
    return units.unit(
        f"{NAME}-{classes}",
        "pairs",
        [classes, steps, budget],
        lambda: _apart(classes, steps, budget),
    )


def _apart(classes: int, steps: int, budget: int) -> dict:
    path = units.RUNS / NAME / f"{classes}.json"
    flags = ["--classes", classes, "--steps", steps, "--budget", budget, "--out", path]
    words = [sys.executable, "-m", "experiments.scale.many_cells", *map(str, flags)]
    subprocess.run(words, cwd=units.ROOT, check=True, stdout=subprocess.DEVNULL)
    found = files.read_json(path)
    path.unlink()
    return found


def main(
    classes: int = CLASSES,
    steps: int = STEPS,
    budget: int = BUDGET,
    smoke: bool = False,
    out: str | None = None,
) -> None:
    """Runs the search in this process and prints its row; `out` writes it as JSON."""
    units.use_cache()
    row = sweep_pairs(4, 2, 1 << 20) if smoke else sweep_pairs(classes, steps, budget)
    print(units.table([row]))
    if out:
        files.write_json(pathlib.Path(out), row)


if __name__ == "__main__":
    units.cli(main)
