"""Measures sweeps and a training step against plain PyTorch: same machine, same run, same batch, as
many threads.

Four tasks. "mesa": one step of every cell of a grid of classes and levels. "cleanse": one step of
Neural Cleanse for every ordered pair of some classes. "margin": one step of every start of every
class. "training": one supervised step. The first three are timed as `sweep.search` with as many
slots as cells ("jaxbd"), with a single slot, so one cell after another ("loop"), as one batch of
all cells where that is not the default ("vmap"), and as PyTorch's cells one after another ("torch",
see `scale_in_torch.py`). PyTorch has several forms: float32 with channels first, which is what it
does unless it is asked for more; with channels last; with its net in bfloat16 as well. Victims are
frozen: there are gradients of their inputs only, and ours have BatchNorm folded into the
convolutions. Sides take turns, so that whatever else the machine does falls on all; compiling is
apart. Floating-point operations are counted by XLA in the compiled program and given as share of
what a large product of matrices reaches on the same device.

    python scripts/bench_scale.py            # WRN-16-1 and the small VGG; about 15 minutes
    python scripts/bench_scale.py --task mesa --arch resnet18 --width 64 --dtype bfloat16
    python scripts/bench_scale.py --quick    # checks that it runs, its figures mean nothing

The time is on 2 cores.
"""

import contextlib
import dataclasses
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, get_args

import bench_dhbe
import jax
import jax.numpy as jnp
from bench_dhbe import FORMS, NAMES, Form, Side
from scale_cases import (
    QUICK,
    TRAINING,
    Arch,
    Case,
    DType,
    TaskName,
    case_of,
    label,
    mesa_config,
    net_of,
    pixels,
)
from scale_in_torch import in_torch, settings_of

from jaxbd import files
from jaxbd.base import Batch, UserError
from jaxbd.data import draw
from jaxbd.inversion import margin, mesa, neural_cleanse
from jaxbd.models import build
from jaxbd.training import lanes, supervised, sweep
from jaxbd.training.program import Program, Seconds, default_time
from jaxbd.training.run import Run

RESULT = (
    pathlib.Path(__file__).resolve().parents[1] / "experiments" / "results" / "bench_scale.json"
)
MATRIX = {"cpu": 2048}
ACCELERATOR_MATRIX, QUICK_MATRIX = 8192, 128
"""Rows and columns of the matrices whose product is the peak."""
__all__ = ["case_of", "in_torch", "label", "settings_of"]


class Turns(NamedTuple):
    """How a case is timed: turns that each side gets after one that warms up, steps in a turn,
    threads of every side, PyTorch's forms, and whether our sweeps also run with BatchNorm as it
    is."""

    rounds: int
    steps: int
    threads: int
    forms: tuple[Form, ...] = ("eager",)
    unfolded: bool = False


def in_jax(case: Case, steps: int, unfolded: bool = False) -> dict[str, Side]:
    """This package's forms, compiled for turns of so many steps; `unfolded` adds one with BatchNorm
    as it is."""
    net = net_of(case)
    variables = net.init(jax.random.key(0))
    data = Batch(*map(jnp.asarray, pixels(case)))
    count = (build.parameter_count(variables),)
    if case.task == "training":
        return {"jaxbd": _training(case, net, variables, data, count)}
    task = _task(case, net, data)
    frozen = net.frozen(variables) if net.frozen else variables
    ways: dict[str, tuple[int | None, bool, Any]] = {"jaxbd": (None, True, frozen)}
    if case.task != "margin":  # hundreds of single images, one after another
        ways["loop"] = (1, True, frozen)
    if lanes.are_default():
        ways["vmap"] = (None, False, frozen)
    if unfolded:
        ways["unfolded"] = (None, True, variables)
    sides = {
        name: _sweep((*task, victim), slots, in_lanes, count, steps)
        for name, (slots, in_lanes, victim) in ways.items()
    }
    parts: tuple[Any, ...] = (jax.random.key(1), *task, frozen)
    counted = bench_dhbe.operations(sweep.compile_step(*parts))
    return {name: side._replace(operations=counted) for name, side in sides.items()}


def _task(case: Case, net: Any, data: Batch) -> tuple[Any, ...]:
    """(inversion, draw, data, cells) of a sweep."""
    if case.task == "margin":  # never converged, so that every turn makes all its steps
        search = margin.make(net, case.shape, margin.Config(stop_change=0))
        return search, margin.no_batch, None, case.cells
    if case.task == "cleanse":
        inversion = neural_cleanse.make(net, case.shape, neural_cleanse.for_pairs())
    else:
        inversion = mesa.make(net, case.shape, mesa_config(case))
    return inversion, draw.uniform(case.batch), data, case.cells


def _chunk(steps: int) -> int:
    """Steps that are one program where time goes by `lax.scan`; elsewhere it makes no
    difference."""
    return 20 if default_time() == "host" else steps


def _sweep(
    task: tuple, slots: int | None, in_lanes: bool, count: tuple[int, ...], steps: int
) -> Side:
    """`sweep.search` of all cells from their start, after its first turn; `slots` None for as many
    as cells. Without lanes, all cells are one batch on a CPU too."""
    width = sweep.size(task[3]) if slots is None else slots

    def run(steps: int) -> Seconds:
        settings = dict(num_steps=steps, slots=width, chunk=_chunk(steps))
        with _lanes(in_lanes):
            return sweep.search(Run(), "cells", jax.random.key(1), *task, **settings).seconds

    return Side(run, count, run(steps).compile, None)


@contextlib.contextmanager
def _lanes(in_lanes: bool) -> Iterator[None]:
    """Turns lanes off, as they are on an accelerator, unless `in_lanes`."""
    usual = lanes.are_default
    if not in_lanes:
        lanes.are_default = lambda: False
    try:
        yield
    finally:
        lanes.are_default = usual


def _training(case: Case, net: Any, variables: Any, data: Batch, count: tuple[int, ...]) -> Side:
    """One supervised step."""
    trainer, key = supervised.make(net, TRAINING), jax.random.key(1)
    state, drawn = trainer.init(variables), draw.uniform(case.batch)
    advance = lambda state, key, data: trainer.step(
        key, state, drawn(jax.random.fold_in(key, state.step), data)
    )
    program = Program(advance, donate=(0,))
    compiled, holder = program.compiled(state, key, data), [state]

    def run(steps: int) -> None:
        for _ in range(steps):
            holder[0], _ = compiled(holder[0], key, data)
        jax.block_until_ready(holder[0])

    return Side(run, count, program.compile_seconds, bench_dhbe.operations(compiled))


def matrix_peak(size: int, dtype: DType, rounds: int = 5) -> float:
    """Floating-point operations per second of the product of two matrices [size, size]: the best of
    some rounds."""
    a, b = (jax.random.normal(jax.random.key(seed), (size, size), dtype) for seed in (0, 1))
    compiled = Program(lambda a, b: a @ b).compiled(a, b)

    def run(count: int) -> None:
        jax.block_until_ready([compiled(a, b) for _ in range(count)])

    seconds = bench_dhbe.measure({"product": Side(run, (), 0.0, None)}, rounds, 4)["product"]
    return 2 * size**3 / min(seconds)


def bench(case: Case, turns: Turns, peak: float, say: Callable[[str], None]) -> dict[str, Any]:
    """The row of one case. Raises: UserError when the nets of the two sides are not of one size."""
    name = label(dataclasses.asdict(case))
    say(f"{name}: compiling")
    sides = in_jax(case, turns.steps, turns.unfolded)
    sides |= {NAMES[form]: in_torch(case, turns.threads, form) for form in turns.forms}
    if len({side.parameters for side in sides.values()}) > 1:
        sizes = ", ".join(f"{name} {side.parameters[0]}" for name, side in sides.items())
        raise UserError(f"{case.arch}: the nets of the sides differ in parameters: {sizes}")
    say(f"{name}: {turns.rounds} rounds of {turns.steps} steps each")
    seconds = bench_dhbe.measure(sides, turns.rounds, turns.steps)
    over = {
        name: bench_dhbe.spread(
            [theirs / ours for ours, theirs in zip(seconds["jaxbd"], every, strict=True)]
        )
        for name, every in seconds.items()
        if name != "jaxbd"
    }
    return {
        "case": dataclasses.asdict(case),
        "cells": None if case.cells is None else sweep.size(case.cells),
        "parameters": sides["jaxbd"].parameters[0],
        "images_step": case.images,
        "operations_step": sides["jaxbd"].operations,
        "rounds": turns.rounds,
        "steps_round": turns.steps,
        **{name: _figures(case, side, seconds[name], peak) for name, side in sides.items()},
        **{f"{name}_over_jaxbd": ratio for name, ratio in over.items()},
    }


def _figures(case: Case, side: Side, seconds: list[float], peak: float) -> dict[str, Any]:
    """What is recorded of one side."""
    found = bench_dhbe.spread(seconds)
    rate = side.operations and side.operations / found["median"]
    return {
        "seconds_compile": side.seconds_compile,
        "seconds_step": found,
        "images_per_second": case.images / found["median"],
        "operations_per_second": rate,
        "share_of_peak": rate and rate / peak,
    }


WORDS = {
    "torch": "PyTorch",
    "torch_channels_last": "PyTorch with channels last",
    "torch_bfloat16": "PyTorch in bfloat16",
    "torch_compiled": "PyTorch's compiled net",
    "loop": "our sequential form",
    "vmap": "one batch of all cells",
    "unfolded": "without folding",
}
"""A side beside ours -> what it is, for people."""


def table(rows: list[dict]) -> str:
    """The rows for people."""
    line = "{:<38} {:<19} {:>9} {:>9} {:>19} {:>9} {:>8} {:>8}".format
    lines = [
        line("case", "side", "images/s", "step s", "quartiles", "compile s", "GFLOP/s", "of peak")
    ]
    for row in rows:
        for name in [name for name in ("jaxbd", *WORDS) if name in row]:
            found = row[name]
            seconds, rate, share = (
                found["seconds_step"],
                found["operations_per_second"],
                found["share_of_peak"],
            )
            lines.append(
                line(
                    label(row["case"]) if name == "jaxbd" else "",
                    name,
                    f"{found['images_per_second']:.0f}",
                    f"{seconds['median']:.4f}",
                    " - ".join(f"{value:.4f}" for value in seconds["quartiles"]),
                    f"{found['seconds_compile']:.1f}",
                    "" if rate is None else f"{rate / 1e9:.1f}",
                    "" if share is None else f"{share:.0%}",
                )
            )
    return "\n".join(lines)


def sentence(row: dict[str, Any]) -> str:
    """The ratios of one case for people."""
    ratios = [
        f"{WORDS[name]} {row[f'{name}_over_jaxbd']['median']:.2f} times as long (quartiles "
        f"{' - '.join(f'{value:.2f}' for value in row[f'{name}_over_jaxbd']['quartiles'])})"
        for name in WORDS
        if name in row
    ]
    return (
        f"{label(row['case'])}: {', '.join(ratios)}; {row['images_step']} images a step,"
        f" {row['rounds']} rounds"
    )


def main(
    task: tuple[TaskName, ...] = get_args(TaskName),
    arch: tuple[Arch, ...] = ("wrn16-1", "vgg"),
    width: int | None = None,
    side: int | None = None,
    batch: int | None = None,
    classes: int | None = None,
    levels: tuple[float, ...] | None = None,
    hidden: int | None = None,
    dtype: DType = "float32",
    rounds: int = 5,
    steps: int = 1,
    threads: int | None = None,
    torch: tuple[Form, ...] = FORMS,
    unfolded: bool = False,
    quick: bool = False,
    out: pathlib.Path | None = None,
) -> None:
    """Runs the benchmark, prints its table and writes its JSON.

    Args:
      task: what to time.
      arch: nets to time it with; each has a width of its own, which --width changes.
      width: channels of the net's first stage.
      side: of the images, in pixels.
      batch: images of a cell in a step.
      classes: of the grid, or the classes between which pairs are searched.
      levels: of the MESA grid.
      hidden: width of MESA's own nets.
      dtype: what the nets compute in.
      rounds: turns that each side gets; one more warms up.
      steps: in a turn.
      threads: of all sides; all cores this process may use when not given.
      torch: PyTorch's forms, see `bench_dhbe.NAMES`; "compiled" needs a C++ compiler on a CPU.
      unfolded: also time our sweeps with BatchNorm left as it is.
      quick: smallest sizes instead; writes only where --out says.
      out: the JSON file; experiments/results/bench_scale.json by default.
    """
    threads = bench_dhbe.bind(threads)
    given = dict(
        width=width,
        side=side,
        batch=batch,
        classes=classes,
        levels=levels,
        hidden=hidden,
        dtype=dtype,
    )
    changes = {name: value for name, value in given.items() if value is not None}
    if quick:
        changes, rounds, steps = {**QUICK, **changes}, 1, 1
    cases = [case_of(name, own, **changes) for name in task for own in arch]
    content = measure_all(cases, Turns(rounds, steps, threads, torch, unfolded), quick)
    print(
        f"{jax.default_backend()}: {files.device()}, {threads} threads a side, torch"
        f" {content['versions']['torch']}"
    )
    print("\n".join([table(content["rows"]), *map(sentence, content["rows"])]))
    out = out or (None if quick else RESULT)
    if out:
        files.write_json(out, content)


def measure_all(cases: list[Case], turns: Turns, quick: bool = False) -> dict[str, Any]:
    """The record of a benchmark."""
    say = lambda text: print(text, file=sys.stderr, flush=True)
    size = QUICK_MATRIX if quick else MATRIX.get(jax.default_backend(), ACCELERATOR_MATRIX)
    peaks: dict[DType, float] = {}
    for case in cases:
        if case.dtype not in peaks:
            peaks[case.dtype] = matrix_peak(size, case.dtype)
    rows = [bench(case, turns, peaks[case.dtype], say) for case in cases]
    _, torch = bench_dhbe.pytorch()
    return {
        "schema": "jaxbd/1/bench-scale",
        "backend": jax.default_backend(),
        "device": files.device(),
        "versions": {**files.versions(), "torch": torch.__version__},
        "quick": quick,
        "threads": turns.threads,
        "matrix_size": size,
        "matrix_operations_per_second": peaks,
        "rows": rows,
    }


if __name__ == "__main__":
    bench_dhbe.launch(main, "bench_scale")
