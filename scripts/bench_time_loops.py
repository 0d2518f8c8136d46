"""Measures the ways over time and over cells on this machine's default backend, and says which
defaults are right.

Over time: "host" (a host loop of one compiled step) and "scan" (a chunk of steps as one program).
Over cells: "loop" (one after another), "vmap" (as one batch), "map" (a compiled loop) and, on a
CPU, "lanes" (groups side by side on its cores; students one by one). Two tasks with opposite needs:
MESA, which asks only for gradients by the images of one shared victim, and training of one student
per cell, which asks for the weight gradients of convolutions. On XLA:CPU such a gradient inside a
compiled loop is the trap that sets the CPU default.

    python scripts/bench_time_loops.py            # at most about 90 seconds on 2 cores
    python scripts/bench_time_loops.py --quick    # checks that it runs, its figures mean nothing
"""

import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jaxbd import files
from jaxbd.base import Batch, Inversion, Net
from jaxbd.data import draw
from jaxbd.inversion import mesa
from jaxbd.models import build
from jaxbd.training import lanes, loop, supervised, sweep
from jaxbd.training.program import Clock, Time, default_time

RESULT = (
    pathlib.Path(__file__).resolve().parents[1]
    / "experiments"
    / "results"
    / "bench_time_loops.json"
)
CLASSES = 10
How = Literal["lanes", "vmap", "map", "loop"]
"""Ways over cells: groups side by side on a CPU's cores, one batch, `lax.map`, one by one."""
OVER_CELLS: tuple[How, ...] = get_args(How)
OVER_TIME: tuple[Time, ...] = ("host", "scan")
PATCHES = "patches"
"""A way over cells: vmap of a net whose convolutions are products of patches and a matrix."""
BATCHED: dict[str, How] = {"mesa": "vmap", "students": "loop"}
"""How each task goes over cells where there are no lanes: on accelerators, and in a compiled loop
over time."""


def usual(task: str) -> How:
    """How a search goes over cells: on a CPU in lanes, elsewhere as one batch, or one cell after
    another where each has weights of its own."""
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


LAPTOP = Settings(
    side=16, width=32, stages=3, batch=32, cells=4, chunk=4, seconds=2.0, least=3, most=20
)
"""Small, and yet wide enough for the trap to show."""
ACCELERATOR = Settings(
    side=32, width=64, stages=3, batch=128, cells=10, chunk=20, seconds=3.0, least=3, most=50
)
QUICK = Settings(side=8, width=4, stages=1, batch=4, cells=2, chunk=2, seconds=0.0, least=1, most=1)


class Task(NamedTuple):
    """A method in the form that a sweep runs, the same with convolutions as products, and the
    victim it shares."""

    method: Inversion
    by_patches: Inversion | None
    victim: Any


def tasks(settings: Settings) -> dict[str, Task]:
    """Both tasks by name."""
    shape = (settings.side, settings.side, 3)
    options = {"width": settings.width, "stages": settings.stages}
    net = build.net(build.Spec(arch="cnn", classes=CLASSES, image_shape=shape, options=options))
    students, by_patches = _students(net), _students(with_patches(net))
    victim = net.init(jax.random.key(1))
    inversion = mesa.make(net, shape, mesa.Config(hidden=64))
    return {"mesa": Task(inversion, None, victim), "students": Task(students, by_patches, {})}


def _students(net: Net) -> Inversion:
    """Training of one net per cell."""
    trainer = supervised.make(net, supervised.Config(learning_rate=1e-3))

    def nothing(*_: Any) -> Any:
        raise NotImplementedError("students stamp nothing: only init and step are timed")

    return Inversion(
        init=lambda key: trainer.init(net.init(key)),
        step=lambda key, state, batch, cell, victim: trainer.step(key, state, batch),
        stamp=nothing,
        sample=nothing,
    )


def with_patches(net: Net) -> Net:
    """`net` with every ungrouped convolution of its Flax modules as a product of patches and a
    matrix."""

    def swap(call, args, kwargs, context):
        module = context.module
        if (
            context.method_name == "__call__"
            and isinstance(module, nn.Conv)
            and module.feature_group_count == 1
        ):
            object.__setattr__(module, "conv_general_dilated", by_patches)
        return call(*args, **kwargs)

    def apply(variables, images, *, train=False):
        with nn.intercept_methods(swap):
            return net.apply(variables, images, train=train)

    return Net(net.init, apply)


def by_patches(x, kernel, strides, padding, *, dimension_numbers, **settings):
    """`jax.lax.conv_general_dilated` of images [B, H, W, C] and a kernel [h, w, C, D], without
    dilation or groups."""
    del settings
    layout = jax.lax.conv_dimension_numbers(x.shape, kernel.shape, dimension_numbers)
    assert layout.lhs_spec == (0, 3, 1, 2) and layout.rhs_spec == (3, 2, 0, 1)
    patches = jax.lax.conv_general_dilated_patches(
        x, kernel.shape[:2], strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    matrix = kernel.transpose(2, 0, 1, 3).reshape(
        -1, kernel.shape[3]
    )  # patches come channel by channel
    return patches @ matrix


def ways(name: str) -> list[tuple[str, Time]]:
    """(over cells, over time) of a task: each axis varied on its own, the other at its default."""
    default = default_time()
    hows: list[str] = [how for how in OVER_CELLS if how != "lanes" or lanes.are_default()]
    hows += [PATCHES] if name == "students" else []
    others: list[Time] = [over_time for over_time in OVER_TIME if over_time != default]
    found: list[tuple[str, Time]] = [(how, default) for how in hows]
    return [*found, *((BATCHED[name], over_time) for over_time in others)]


def data(settings: Settings) -> Batch:
    """Random images uint8 [256, side, side, 3] and labels [256]: speed does not depend on what they
    show."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (256, settings.side, settings.side, 3), np.uint8)
    return Batch(jnp.asarray(images), jnp.asarray(rng.integers(0, CLASSES, 256), jnp.int32))


def forms(
    inversion: Inversion,
    batches: Callable[..., Batch],
    how: How,
    settings: Settings,
    over_time: Time,
    group: int | None,
) -> Callable[..., Any]:
    """(states, keys, cells, victim, data) -> states after one chunk, the way that is timed."""

    def one(*args):
        state, key, cell, victim, data = args
        draw_key, step_key = jax.random.split(jax.random.fold_in(key, state.step))
        return inversion.step(step_key, state, batches(draw_key, data, cell.source), cell, victim)

    def mapped(states, keys, cells, victim, data):
        return jax.lax.map(lambda each: one(*each, victim, data), (states, keys, cells))

    def run(step, states, *args):
        steps = settings.chunk
        return loop.run(step, states, *args, num_steps=steps, chunk=steps, over_time=over_time)[0]

    def one_by_one(states, keys, cells, *shared):
        pick = lambda tree, number: jax.tree.map(lambda leaf: leaf[number], tree)
        every = (states, keys, cells)
        found = [
            run(one, *(pick(each, number) for each in every), *shared)
            for number in range(settings.cells)
        ]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)

    every = jax.vmap(one, (0, 0, 0, None, None))
    if how == "lanes":
        return _in_lanes(every, settings, group)
    return {"vmap": partial(run, every), "map": partial(run, mapped), "loop": one_by_one}[how]


def _in_lanes(step: Callable[..., Any], settings: Settings, group: int | None):
    """One chunk of the batched `step`, by groups of cells side by side on the cores."""
    program, split = loop.compile_step(step, settings.chunk), (0, 1, 2)

    def run(*args):
        size = group or lanes.width(program, args, split, settings.cells)
        return lanes.advance(program, args, split, settings.chunk, size)[0]

    return run


def measure(
    settings: Settings,
    inversion: Inversion,
    victim: Any,
    how: How,
    over_time: Time,
    group: int | None = None,
) -> dict:
    """Compile seconds and the seconds of each chunk, at whose end the device is waited for."""
    keys, cells = (
        jax.random.split(jax.random.key(0), settings.cells),
        sweep.grid(range(settings.cells)),
    )
    states, pixels = jax.jit(jax.vmap(inversion.init))(keys), data(settings)
    advance = forms(inversion, draw.uniform(settings.batch), how, settings, over_time, group)
    compile_seconds, runs, started = 0.0, [], time.perf_counter()
    while len(runs) <= settings.least or (
        len(runs) <= settings.most and sum(runs) < settings.seconds
    ):
        clock = Clock()
        states = jax.block_until_ready(advance(states, keys, cells, victim, pixels))
        seconds = clock.read()
        compile_seconds += seconds.compile
        runs.append(seconds.run)
    runs = runs[1:]
    low, median, high = np.quantile(runs, (0.25, 0.5, 0.75))
    return {
        "chunks": len(runs),
        "seconds_compile": compile_seconds,
        "seconds_chunk": {
            "median": median,
            "quartiles": [low, high],
            "lowest": min(runs),
            "highest": max(runs),
        },
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
            method: Any = task.by_patches if how == PATCHES else task.method
            cells: Any = "vmap" if how == PATCHES else how
            group = 1 if name == "students" else None
            figures = measure(settings, method, task.victim, cells, over_time, group)
            found.append({"task": name, "over_cells": how, "over_time": over_time, **figures})
        fastest = max(row["images_per_second"] for row in found)
        rows += [{**row, "slower": fastest / row["images_per_second"]} for row in found]
    return rows


def verdicts(rows: list[dict]) -> list[dict]:
    """For each task and axis, the other axis at its default: the fastest way, and how many times
    slower each is."""
    found = []
    for name, batched in BATCHED.items():
        own = [row for row in rows if row["task"] == name]
        default = (usual(name), default_time())
        over_time = [row for row in own if (row["over_cells"], row["over_time"]) == default]
        over_time += [
            row for row in own if row["over_cells"] == batched and row["over_time"] != default[1]
        ]
        over_cells = [row for row in own if row["over_time"] == default[1]]
        for axis, along, way in (
            ("over_time", over_time, default[1]),
            ("over_cells", over_cells, default[0]),
        ):
            fastest = min(along, key=lambda row: row["slower"])
            slower = {row[axis]: row["slower"] / fastest["slower"] for row in along}
            found.append(
                {
                    "task": name,
                    "axis": axis,
                    "fastest": fastest[axis],
                    "slower": slower,
                    "default": way,
                }
            )
    return found


def table(rows: list[dict]) -> str:
    """The rows for people."""
    line = "{:<9} {:<7} {:<5} {:>10} {:>8} {:>10} {:>12} {:>21}".format
    lines = [
        line("task", "cells", "time", "images/s", "slower", "compile s", "chunk s", "quartiles")
    ]
    for row in rows:
        seconds = row["seconds_chunk"]
        spread = (
            " - ".join(f"{value:.4f}" for value in seconds["quartiles"]) + f" n={row['chunks']}"
        )
        lines.append(
            line(
                row["task"],
                row["over_cells"],
                row["over_time"],
                f"{row['images_per_second']:.0f}",
                f"{row['slower']:.1f}x",
                f"{row['seconds_compile']:.1f}",
                f"{seconds['median']:.4f}",
                spread,
            )
        )
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
    print(f"{jax.default_backend()}: {files.device()}")
    print("\n".join([table(rows), *map(sentence, found)]))
    if out:
        content = {
            "schema": "jaxbd/1/bench-time-loops",
            "backend": jax.default_backend(),
            "device": files.device(),
            "versions": files.versions(),
            "quick": quick,
            "settings": dataclasses.asdict(settings),
            "rows": rows,
            "verdicts": found,
        }
        files.write_json(out, content)


if __name__ == "__main__":
    jax.config.update(
        "jax_enable_compilation_cache", False
    )  # compile seconds are those of a first run
    tyro.cli(main)
