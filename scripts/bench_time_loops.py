"""Measures the ways over time and over cells on this machine's default backend, and says which defaults are right.

Over time: "host" (a host loop of one compiled step) and "scan" (a chunk of steps as one program). Over cells: "loop"
(one after another), "vmap" (as one batch), "map" (a compiled loop) and, on a CPU, "lanes" (groups side by side on its
cores; students one by one). Two tasks with opposite needs: MESA, which asks
only for gradients by the images of one shared victim, and training of one student per cell, which asks for the weight
gradients of convolutions. On XLA:CPU such a gradient inside a compiled loop is the trap that sets the CPU default.

    python scripts/bench_time_loops.py            # at most about 90 seconds on 2 cores
    python scripts/bench_time_loops.py --quick    # seconds; checks that it runs, its figures mean nothing
"""

import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jaxbd import lanes, loop, record, supervised, sweep
from jaxbd.base import Batch, Inversion, Net
from jaxbd.data import draw
from jaxbd.inversion import mesa
from jaxbd.models import build

RESULT = pathlib.Path(__file__).resolve().parents[1] / "experiments" / "results" / "bench_time_loops.json"
CLASSES = 10
OVER_CELLS, OVER_TIME = get_args(sweep.How), ("host", "scan")
PATCHES = "patches"
"""A way over cells: vmap of a net whose convolutions are products of patches and a matrix."""
BATCHED = {"mesa": "vmap", "students": "loop"}
"""How each task goes over cells where there are no lanes: on accelerators, and in a compiled loop over time."""


def usual(task: str) -> sweep.How:
    """How a task goes over cells: the default of `sweep.fit`, and what it recommends for cells with own weights."""
    return "lanes" if lanes.are_default() else BATCHED[task]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Sizes of the measurement.

    Attributes:
      side: of the square colour images, in pixels.
      width: channels of the CNN's first stage; each further one has twice as many.
      stages: of the CNN.
      batch: images in a batch.
      cells: cells of the MESA sweep, and students.
      chunk: steps in a chunk, which is what is timed.
      seconds: each way repeats its chunk until it ran so long,
      least, most: but so many times at least and at most, the first, which warms up, apart.
    """

    side: int
    width: int
    stages: int
    batch: int
    cells: int
    chunk: int
    seconds: float
    least: int
    most: int


LAPTOP = Settings(side=16, width=32, stages=3, batch=32, cells=4, chunk=4, seconds=2.0, least=3, most=20)
"""Small, and yet wide enough for the trap to show."""
ACCELERATOR = Settings(side=32, width=64, stages=3, batch=128, cells=10, chunk=20, seconds=3.0, least=3, most=50)
QUICK = Settings(side=8, width=4, stages=1, batch=4, cells=2, chunk=2, seconds=0.0, least=1, most=1)


class Task(NamedTuple):
    """A method in the form that `sweep.fit` runs, the same with convolutions as products, and the victim it shares."""

    method: Inversion
    by_patches: Inversion | None
    victim: Any


def tasks(settings: Settings) -> dict[str, Task]:
    """Both tasks by name."""
    shape = (settings.side, settings.side, 3)
    options = {"width": settings.width, "stages": settings.stages}
    net = build.net(build.Spec(arch="cnn", classes=CLASSES, image_shape=shape, options=options))
    students, by_patches = _students(net), _students(with_patches(net))
    trained = sweep.init(jax.random.key(1), students, sweep.grid(target=range(settings.cells))).variables
    victim = jax.tree.map(lambda leaf: leaf[0], trained)
    inversion = mesa.make(net, shape, mesa.Config(hidden=64))
    return {"mesa": Task(inversion, None, victim), "students": Task(students, by_patches, {})}


def _students(net: Net) -> Inversion:
    """Training of one net per cell."""
    trainer = supervised.make(net, supervised.Config(learning_rate=1e-3))
    return Inversion(
        init=lambda key: trainer.init(net.init(key)),
        step=lambda key, state, batch, cell, victim: trainer.step(key, state, batch),
        stamp=None,  # students stamp nothing: only init and step are timed
        sample=None,
    )


def with_patches(net: Net) -> Net:
    """`net` with every ungrouped convolution of its Flax modules as a product of patches and a matrix."""

    def swapped(call, args, kwargs, context):
        module = context.module
        if context.method_name == "__call__" and isinstance(module, nn.Conv) and module.feature_group_count == 1:
            object.__setattr__(module, "conv_general_dilated", by_patches)
        return call(*args, **kwargs)

    def apply(variables, images, *, train=False):
        with nn.intercept_methods(swapped):
            return net.apply(variables, images, train=train)

    return Net(net.init, apply)


def by_patches(x, kernel, strides, padding, *, dimension_numbers, **settings):
    """`jax.lax.conv_general_dilated` of images [B, H, W, C] and a kernel [h, w, C, D], without dilation or groups."""
    del settings
    layout = jax.lax.conv_dimension_numbers(x.shape, kernel.shape, dimension_numbers)
    assert layout.lhs_spec == (0, 3, 1, 2) and layout.rhs_spec == (3, 2, 0, 1)
    patches = jax.lax.conv_general_dilated_patches(
        x, kernel.shape[:2], strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    matrix = kernel.transpose(2, 0, 1, 3).reshape(-1, kernel.shape[3])  # patches come channel by channel
    return patches @ matrix


def ways(name: str) -> list[tuple[str, loop.Time]]:
    """(over cells, over time) of a task: each axis varied on its own, the other at its default."""
    default, hows = loop.default_time(), [how for how in OVER_CELLS if how != "lanes" or lanes.are_default()]
    cells = [(how, default) for how in (*hows, *([PATCHES] if name == "students" else []))]
    return cells + [(BATCHED[name], over_time) for over_time in OVER_TIME if over_time != default]


def data(settings: Settings) -> Batch:
    """Random images uint8 [256, side, side, 3] and labels [256]: speed does not depend on what they show."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (256, settings.side, settings.side, 3), np.uint8)
    return Batch(jnp.asarray(images), jnp.asarray(rng.integers(0, CLASSES, 256), jnp.int32))


def measure(
    settings: Settings,
    inversion: Inversion,
    victim: Any,
    how: sweep.How,
    over_time: loop.Time,
    group: int | None = None,
) -> dict:
    """Compile seconds and the seconds of each chunk; every chunk ends with `jax.block_until_ready` (`loop.run`)."""
    key, cells = jax.random.key(0), sweep.grid(target=range(settings.cells))
    states, batches, pixels = sweep.init(key, inversion, cells), draw.uniform(settings.batch), data(settings)
    compile_seconds, runs, started = 0.0, [], time.perf_counter()
    while len(runs) <= settings.least or (len(runs) <= settings.most and sum(runs) < settings.seconds):
        states, _, seconds = sweep.fit(
            key, inversion, batches, pixels, cells, victim, states=states, num_steps=settings.chunk,
            how=how, group=group, over_time=over_time, chunk=settings.chunk,
        )  # fmt: skip
        compile_seconds += seconds.compile
        runs.append(seconds.run)
    runs = runs[1:]
    low, median, high = np.quantile(runs, (0.25, 0.5, 0.75))
    return {
        "chunks": len(runs),
        "seconds_compile": compile_seconds,
        "seconds_chunk": {"median": median, "quartiles": [low, high], "lowest": min(runs), "highest": max(runs)},
        "images_per_second": settings.batch * settings.cells * settings.chunk / median,
        "seconds_measuring": time.perf_counter() - started,
    }


def bench(settings: Settings, say: Callable[[str], None]) -> list[dict]:
    """One row for each task and way, with how many times slower it is than the task's fastest."""
    rows = []
    for name, task in tasks(settings).items():
        found = []
        for how, over_time in ways(name):
            say(f"{name}: {how} over cells, {over_time} over time")
            method, cells = (task.by_patches, "vmap") if how == PATCHES else (task.method, how)
            group = 1 if name == "students" else None
            measured = measure(settings, method, task.victim, cells, over_time, group)
            found.append({"task": name, "over_cells": how, "over_time": over_time, **measured})
        fastest = max(row["images_per_second"] for row in found)
        rows += [{**row, "slower": fastest / row["images_per_second"]} for row in found]
    return rows


def verdicts(rows: list[dict]) -> list[dict]:
    """For each task and axis, the other axis at its default: the fastest way, and how many times slower each is."""
    found = []
    for name, batched in BATCHED.items():
        own = [row for row in rows if row["task"] == name]
        default = (usual(name), loop.default_time())
        over_time = [row for row in own if (row["over_cells"], row["over_time"]) == default]
        over_time += [row for row in own if row["over_cells"] == batched and row["over_time"] != default[1]]
        over_cells = [row for row in own if row["over_time"] == default[1]]
        for axis, along, way in (("over_time", over_time, default[1]), ("over_cells", over_cells, default[0])):
            fastest = min(along, key=lambda row: row["slower"])
            slower = {row[axis]: row["slower"] / fastest["slower"] for row in along}
            found.append({"task": name, "axis": axis, "fastest": fastest[axis], "slower": slower, "default": way})
    return found


def table(rows: list[dict]) -> str:
    """The rows for people."""
    line = "{:<9} {:<7} {:<5} {:>10} {:>8} {:>10} {:>12} {:>21}".format
    lines = [line("task", "cells", "time", "images/s", "slower", "compile s", "chunk s", "quartiles")]
    for row in rows:
        seconds = row["seconds_chunk"]
        spread = " - ".join(f"{value:.4f}" for value in seconds["quartiles"]) + f" n={row['chunks']}"
        lines.append(
            line(
                row["task"], row["over_cells"], row["over_time"], f"{row['images_per_second']:.0f}",
                f"{row['slower']:.1f}x", f"{row['seconds_compile']:.1f}", f"{seconds['median']:.4f}", spread,
            )
        )  # fmt: skip
    return "\n".join(lines)


def sentence(verdict: dict) -> str:
    """A verdict for people; a default within a tenth of the fastest counts as right."""
    others = ", ".join(f"{way} {ratio:.1f}x" for way, ratio in verdict["slower"].items())
    right = "right" if verdict["slower"][verdict["default"]] <= 1.1 else "not the fastest here"
    where = f"{verdict['task']}, {verdict['axis'].replace('_', ' ')}"
    return f"{where}: {others}; the default, {verdict['default']}, is {right}"


def main(quick: bool = False, out: pathlib.Path | None = None) -> None:
    """Runs the benchmark at sizes that suit the backend, prints its table and writes its JSON.

    Args:
      quick: smallest sizes instead; writes only where --out says.
      out: the JSON file; experiments/results/bench_time_loops.json by default.
    """
    settings = QUICK if quick else LAPTOP if jax.default_backend() == "cpu" else ACCELERATOR
    out = out or (None if quick else RESULT)
    rows = bench(settings, lambda text: print(text, file=sys.stderr, flush=True))
    found = verdicts(rows)
    print(f"{jax.default_backend()}: {record.device()}")
    print("\n".join([table(rows), *map(sentence, found)]))
    if out:
        content = {
            "schema": "jaxbd/1/bench-time-loops",
            "backend": jax.default_backend(),
            "device": record.device(),
            "versions": record.versions(),
            "quick": quick,
            "settings": dataclasses.asdict(settings),
            "rows": rows,
            "verdicts": found,
        }
        record.write_json(out, content)


if __name__ == "__main__":
    jax.config.update("jax_enable_compilation_cache", False)  # compile seconds are those of a first run
    tyro.cli(main)
