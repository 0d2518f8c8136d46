"""Measures sweeps and a training step against plain PyTorch: same machine, same run, same batch, as many threads.

Three tasks. "mesa": one step of every cell of a grid of classes and levels. "cleanse": one step of Neural Cleanse for
every ordered pair of some classes. "training": one supervised step. The first two are timed as `sweep.fit` with its
default way over cells ("jaxbd"), as its own sequential form ("loop"), as one batch of all cells where that is not the
default ("vmap"), and as PyTorch's cells one after another ("torch": `mesa_in_torch.py`, `cleanse_in_torch.py`,
`training_in_torch.py`, op by op). Victims are frozen: there are gradients of their inputs only, and ours have BatchNorm
folded into the convolutions. Sides take turns, so that whatever else the machine does falls on all; compiling is apart.
Floating-point operations are counted by XLA in the compiled program and shown as share of what a large product of
matrices reaches on the same device.

    python scripts/bench_scale.py                    # WRN-16-1 and the small VGG; about 15 minutes on 2 cores
    python scripts/bench_scale.py --arch resnet18 --width 64 --batch 128 --dtype bfloat16 --task mesa
    python scripts/bench_scale.py --quick            # checks that it runs, its figures mean nothing
"""

import dataclasses
import pathlib
import sys
from collections.abc import Callable
from typing import Any, Literal, get_args

import bench_dhbe
import jax
import jax.numpy as jnp
import numpy as np
from bench_dhbe import MEAN, STD, Side

from jaxbd import loop, record, supervised, sweep
from jaxbd.base import Batch, Cell, UserError
from jaxbd.data import draw
from jaxbd.inversion import mesa, neural_cleanse
from jaxbd.models import build

RESULT = pathlib.Path(__file__).resolve().parents[1] / "experiments" / "results" / "bench_scale.json"
TaskName = Literal["mesa", "cleanse", "training"]
Arch = Literal["wrn16-1", "vgg", "resnet18"]
DType = Literal["float32", "bfloat16"]
CLASSES, IMAGES = 10, 512
WIDTHS = {"wrn16-1": 16, "vgg": 32, "resnet18": 64}
MATRIX = {"cpu": 2048}
ACCELERATOR_MATRIX, QUICK_MATRIX = 8192, 128
"""Rows and columns of the matrices whose product is the peak."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes of one comparison.

    Attributes:
      task: what is timed.
      arch: of the net.
      width: channels of its first stage.
      side: of the square colour images, in pixels.
      batch: images of a cell in a step.
      classes: of the MESA grid; of Neural Cleanse, all ordered pairs of these.
      levels: of the MESA grid.
      hidden: width of MESA's generator and statistics network.
      dtype: what the net computes in; everything else is float32.
    """

    task: TaskName
    arch: Arch
    width: int
    side: int = 32
    batch: int = 32
    classes: int = 10
    levels: tuple[float, ...] = (0.5, 0.8, 0.9)
    hidden: int = 512
    dtype: DType = "float32"

    @property
    def cells(self) -> Cell | None:
        """The grid; None for training."""
        if self.task == "training":
            return None
        if self.task == "mesa":
            return sweep.grid(range(self.classes), self.levels)
        return sweep.grid(range(self.classes), source=range(self.classes))

    @property
    def images(self) -> int:
        """Images that pass the net with a gradient in one step of all cells."""
        return self.batch * (1 if self.cells is None else sweep.size(self.cells))

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.side, self.side, 3)


USUAL_CLASSES = {"mesa": 10, "cleanse": 6, "training": 10}
"""30 cells each."""
QUICK = {"width": 4, "side": 8, "batch": 4, "classes": 2, "levels": (0.8,), "hidden": 8}


def net_of(case: Case):
    """The net of a case."""
    return build.net(
        build.Spec(
            arch=case.arch, classes=CLASSES, image_shape=case.shape, mean=(MEAN,), std=(STD,),
            options={"width": case.width}, dtype=case.dtype,
        )
    )  # fmt: skip


def pixels(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Random images uint8 [N, side, side, 3] and labels [N] of all classes; speed does not depend on what they show."""
    images = np.random.default_rng(0).integers(0, 256, (IMAGES, *case.shape), np.uint8)
    return images, (np.arange(IMAGES) % CLASSES).astype(np.int32)


def in_jax(case: Case, steps: int, unfolded: bool = False) -> dict[str, Side]:
    """This package's forms, compiled for turns of so many steps; `unfolded` adds one with BatchNorm as it is."""
    net = net_of(case)
    variables = net.init(jax.random.key(0))
    data = Batch(*map(jnp.asarray, pixels(case)))
    count = (build.parameter_count(variables),)
    if case.task == "training":
        return {"jaxbd": _training(case, net, variables, data, count)}
    inversion = mesa.make(net, case.shape, mesa_config(case))
    if case.task == "cleanse":
        inversion = neural_cleanse.make(net, case.shape, neural_cleanse.for_pairs())
    task = (inversion, draw.uniform(case.batch), data, case.cells)
    frozen = net.frozen(variables)
    usual = sweep.default_how()
    ways = {"jaxbd": (usual, frozen), "loop": ("loop", frozen)}
    if usual != "vmap":
        ways["vmap"] = ("vmap", frozen)
    if unfolded:
        ways["unfolded"] = (usual, variables)
    sides = {name: _sweep((*task, victim), how, count, steps) for name, (how, victim) in ways.items()}
    counted = bench_dhbe.operations(sweep.compiled_step(jax.random.key(1), *task, frozen, chunk=_chunk(steps)))
    return {name: side._replace(operations=counted) for name, side in sides.items()}


def _chunk(steps: int) -> int:
    """Steps that are one program where time goes by `lax.scan`; elsewhere it makes no difference."""
    return 20 if loop.default_time() == "host" else steps


def mesa_config(case: Case) -> mesa.Config:
    """The released settings."""
    return mesa.Config(hidden=case.hidden)


def _sweep(task: tuple, how: sweep.How, count: tuple[int, ...], steps: int) -> Side:
    """`sweep.fit` in one form, after its first turn."""
    inversion, drawn, data, cells, victim = task
    holder = [sweep.init(jax.random.key(1), inversion, cells)]

    def run(steps: int) -> loop.Seconds:
        holder[0], _, seconds = sweep.fit(
            jax.random.key(1),
            inversion,
            drawn,
            data,
            cells,
            victim,
            num_steps=steps,
            states=holder[0],
            how=how,
            chunk=_chunk(steps),
        )
        return seconds

    return Side(run, count, run(steps).compile, None)


def _training(case: Case, net: Any, variables: Any, data: Batch, count: tuple[int, ...]) -> Side:
    """One supervised step."""
    trainer, key = supervised.make(net, TRAINING), jax.random.key(1)
    state, drawn = trainer.init(variables), draw.uniform(case.batch)
    advance = lambda state, key, data: trainer.step(key, state, drawn(jax.random.fold_in(key, state.step), data))
    program = loop.Program(advance, donate=(0,))
    compiled, holder = program.compiled(state, key, data), [state]

    def run(steps: int) -> None:
        for _ in range(steps):
            holder[0], _ = compiled(holder[0], key, data)
        jax.block_until_ready(holder[0])

    return Side(run, count, program.compile_seconds, bench_dhbe.operations(compiled))


TRAINING = supervised.Config(schedule="constant")


def in_torch(case: Case, threads: int) -> Side:
    """The plain PyTorch form, on the same kind of device."""
    (nets, mesas, cleanses), torch = bench_dhbe.pytorch("training_in_torch", "mesa_in_torch", "cleanse_in_torch")
    device = bench_dhbe.torch_device(torch, threads)
    autocast = None if case.dtype == "float32" else torch.bfloat16
    plain = nets.CLASSIFIERS[case.arch](3, case.side, CLASSES, case.width)
    net = nets.Normalised(plain, MEAN, STD).to(device)
    images, labels = pixels(case)
    images = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).to(device)
    labels = torch.from_numpy(labels).long().to(device)
    every = nets.Images(images, labels, case.batch)
    if case.task == "training":
        trainer = nets.Training(net, TRAINING.learning_rate, TRAINING.momentum, TRAINING.weight_decay, autocast)
        turns = [lambda: trainer.step(*every.draw())]
    else:
        net.eval().requires_grad_(False)
        turns = [_cell(case, cell, net, every, (mesas, cleanses), device, autocast) for cell in _each(case.cells)]

    def run(steps: int) -> None:
        for _ in range(steps):
            for turn in turns:
                turn()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return Side(run, (sum(parameter.numel() for parameter in net.parameters()),), 0.0, None)


def _each(cells: Cell) -> list[tuple[int, int, float]]:
    """(target, source, level) of every cell."""
    return list(zip(*(np.asarray(leaf).tolist() for leaf in cells), strict=True))


def _cell(case, cell, net, every, sides, device, autocast) -> Callable[[], Any]:
    """One step of one cell in PyTorch."""
    (target, source, level), (mesas, cleanses) = cell, sides
    if case.task == "mesa":
        model = mesas.SubModel(net, 3, target, level, settings_of(mesas, mesa_config(case), autocast), device)
        return lambda: model.step(every.draw()[0])
    rows = every.labels == source
    own = type(every)(every.images[rows], every.labels[rows], case.batch)
    config = settings_of(cleanses, neural_cleanse.for_pairs(), autocast)
    search = cleanses.Search(net, (3, case.side, case.side), target, config, device)
    return lambda: search.step(own.draw()[0])


def settings_of(module: Any, config: Any, autocast: Any = None) -> Any:
    """The `Settings` of a PyTorch file with the numbers of our `config`."""
    names = [name for name in module.Settings._fields if name != "autocast"]
    return module.Settings(**{name: getattr(config, name) for name in names}, autocast=autocast)


def matrix_peak(size: int, dtype: DType, rounds: int = 5) -> float:
    """Floating-point operations per second of the product of two matrices [size, size]: the best of some rounds."""
    a, b = (jax.random.normal(jax.random.key(seed), (size, size), dtype) for seed in (0, 1))
    compiled = loop.Program(lambda a, b: a @ b).compiled(a, b)

    def run(count: int) -> None:
        for _ in range(count):
            out = compiled(a, b)
        jax.block_until_ready(out)

    seconds = bench_dhbe.measure({"product": Side(run, (), 0.0, None)}, rounds, 4)["product"]
    return 2 * size**3 / min(seconds)


def bench(
    case: Case, rounds: int, steps: int, threads: int, peak: float, unfolded: bool, say: Callable[[str], None]
) -> dict[str, Any]:
    """The row of one case. Raises: UserError when the nets of the two sides are not of one size."""
    say(f"{label(dataclasses.asdict(case))}: compiling")
    sides = {**in_jax(case, steps, unfolded), "torch": in_torch(case, threads)}
    if len({side.parameters for side in sides.values()}) > 1:
        sizes = ", ".join(f"{name} {side.parameters[0]}" for name, side in sides.items())
        raise UserError(f"{case.arch}: the nets of the sides differ in parameters: {sizes}")
    say(f"{label(dataclasses.asdict(case))}: {rounds} rounds of {steps} steps each")
    seconds = bench_dhbe.measure(sides, rounds, steps)
    over = {
        name: bench_dhbe.spread([theirs / ours for ours, theirs in zip(seconds["jaxbd"], every, strict=True)])
        for name, every in seconds.items()
        if name != "jaxbd"
    }
    return {
        "case": dataclasses.asdict(case),
        "cells": None if case.cells is None else sweep.size(case.cells),
        "parameters": sides["jaxbd"].parameters[0],
        "images_step": case.images,
        "operations_step": sides["jaxbd"].operations,
        "rounds": rounds,
        "steps_round": steps,
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


def table(rows: list[dict]) -> str:
    """The rows for people."""
    line = "{:<38} {:<8} {:>9} {:>9} {:>19} {:>9} {:>8} {:>8}".format
    lines = [line("case", "side", "images/s", "step s", "quartiles", "compile s", "GFLOP/s", "of peak")]
    for row in rows:
        for name in [name for name in ("jaxbd", "loop", "vmap", "unfolded", "torch") if name in row]:
            found = row[name]
            seconds, rate, share = found["seconds_step"], found["operations_per_second"], found["share_of_peak"]
            lines.append(
                line(
                    label(row["case"]) if name == "jaxbd" else "", name, f"{found['images_per_second']:.0f}",
                    f"{seconds['median']:.4f}", " - ".join(f"{value:.4f}" for value in seconds["quartiles"]),
                    f"{found['seconds_compile']:.1f}", "" if rate is None else f"{rate / 1e9:.1f}",
                    "" if share is None else f"{share:.0%}",
                )
            )  # fmt: skip
    return "\n".join(lines)


def label(case: dict[str, Any]) -> str:
    """A case in few words."""
    wide = "" if case["dtype"] == "float32" else f" {case['dtype']}"
    cells = {"mesa": f" {case['classes']}x{len(case['levels'])}", "cleanse": f" {case['classes']} classes"}
    grid = cells.get(case["task"], "")
    return f"{case['task']}{grid}, {case['arch']}-{case['width']} {case['side']} b{case['batch']}{wide}"


def sentence(row: dict[str, Any]) -> str:
    """The ratios of one case for people."""
    names = {
        "torch": "PyTorch",
        "loop": "our sequential form",
        "vmap": "one batch of all cells",
        "unfolded": "without folding",
    }
    told = [
        f"{names[name]} {row[f'{name}_over_jaxbd']['median']:.2f} times as long (quartiles "
        f"{' - '.join(f'{value:.2f}' for value in row[f'{name}_over_jaxbd']['quartiles'])})"
        for name in names
        if name in row
    ]
    return f"{label(row['case'])}: {', '.join(told)}; {row['images_step']} images a step, {row['rounds']} rounds"


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
      unfolded: also time our sweeps with BatchNorm left as it is.
      quick: smallest sizes instead; writes only where --out says.
      out: the JSON file; experiments/results/bench_scale.json by default.
    """
    threads = bench_dhbe.bind(threads)
    given = dict(width=width, side=side, batch=batch, classes=classes, levels=levels, hidden=hidden, dtype=dtype)
    changes = {name: value for name, value in given.items() if value is not None}
    if quick:
        changes, rounds, steps = {**QUICK, **changes}, 1, 1
    _, torch = bench_dhbe.pytorch()
    cases = [case_of(name, own, **changes) for name in task for own in arch]
    content = measured(cases, rounds, steps, threads, quick, unfolded)
    print(f"{jax.default_backend()}: {record.device()}, {threads} threads a side, torch {torch.__version__}")
    print("\n".join([table(content["rows"]), *map(sentence, content["rows"])]))
    out = out or (None if quick else RESULT)
    if out:
        record.write_json(out, content)


def case_of(task: TaskName, arch: Arch, **changes: Any) -> Case:
    """The usual case of a task and a net, with changes."""
    usual = {"width": WIDTHS[arch], "classes": USUAL_CLASSES[task]}
    return Case(task=task, arch=arch, **{**usual, **changes})


def measured(
    cases: list[Case], rounds: int, steps: int, threads: int, quick: bool = False, unfolded: bool = False
) -> dict[str, Any]:
    """The record of a benchmark."""
    say = lambda text: print(text, file=sys.stderr, flush=True)
    size = QUICK_MATRIX if quick else MATRIX.get(jax.default_backend(), ACCELERATOR_MATRIX)
    peaks = {dtype: matrix_peak(size, dtype) for dtype in sorted({case.dtype for case in cases})}
    rows = [bench(case, rounds, steps, threads, peaks[case.dtype], unfolded, say) for case in cases]
    _, torch = bench_dhbe.pytorch()
    return {
        "schema": "jaxbd/1/bench-scale",
        "backend": jax.default_backend(),
        "device": record.device(),
        "versions": {**record.versions(), "torch": torch.__version__},
        "quick": quick,
        "threads": threads,
        "matrix_size": size,
        "matrix_operations_per_second": peaks,
        "rows": rows,
    }


if __name__ == "__main__":
    bench_dhbe.launch(main, "bench_scale")
