"""Measures one full DHBE iteration against a plain PyTorch one: same machine, same run, same sizes.

An iteration is k updates of the student and one of each generator. Both sides take turns, so that whatever else the
machine does falls on both; compiling is apart. The PyTorch side is `dhbe_in_torch.py` and runs as it is written, op by
op. Images per second are those that pass the student with a gradient of its weights: k batches of generated images and
k of triggered ones an iteration. Floating-point operations are counted by XLA in the compiled iteration.

    python scripts/bench_dhbe.py                         # a narrow ResNet-18 and a small VGG; minutes on 2 cores
    python scripts/bench_dhbe.py --arch resnet18 --width 64 --batch 256 --dtype bfloat16
    python scripts/bench_dhbe.py --quick                 # checks that it runs, its figures mean nothing
"""

import dataclasses
import importlib
import os
import pathlib
import random
import sys
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import tyro

from jaxbd import erase, loop, record
from jaxbd.base import UserError
from jaxbd.models import build, synthesis
from jaxbd.repair import dhbe

RESULT = pathlib.Path(__file__).resolve().parents[1] / "experiments" / "results" / "bench_dhbe.json"
CLASSES = 10
MEAN, STD = 0.5, 0.25
"""Input normalisation of the nets, every channel."""
SIDES = ("jaxbd", "torch")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes of one comparison.

    Attributes:
      arch: of teacher and student.
      width: channels of its first stage.
      side: of the square images, in pixels.
      channels: of the images.
      batch: generated images in a batch.
      inner_steps: k, student updates in an iteration.
      generator_width: of both generators.
      noise_dim: noise values of both.
      trigger_size: side of the generated triggers, in pixels.
      dtype: what teacher and student compute in; parameters, moments and generators are float32.
    """

    arch: Literal["resnet18", "vgg"]
    width: int
    side: int
    channels: int
    batch: int
    inner_steps: int = 5
    generator_width: int = 64
    noise_dim: int = 256
    trigger_size: int = 5
    dtype: Literal["float32", "bfloat16"] = "float32"

    @property
    def images(self) -> int:
        """Images that pass the student with a gradient of its weights, in one iteration."""
        return 2 * self.inner_steps * self.batch


CASES = {
    "resnet18": Case(arch="resnet18", width=8, side=32, channels=3, batch=32),
    "vgg": Case(arch="vgg", width=16, side=16, channels=1, batch=32, generator_width=16),
}
"""What two cores can do."""
QUICK = {"side": 8, "width": 4, "batch": 4, "inner_steps": 2, "generator_width": 4, "noise_dim": 8, "trigger_size": 3}


class Side(NamedTuple):
    """One way to do an iteration.

    Attributes:
      run: does so many iterations and returns when they are done.
      parameters: of student, sample generator and trigger generator.
      seconds_compile: before the first one; what there is to compile.
      operations: floating-point operations of one, where known.
    """

    run: Callable[[int], None]
    parameters: tuple[int, int, int]
    seconds_compile: float
    operations: float | None


def in_jax(case: Case) -> Side:
    """This package's iteration, compiled."""
    shape, config = (case.side, case.side, case.channels), method_config(case)
    spec = build.Spec(
        arch=case.arch, classes=CLASSES, image_shape=shape, mean=(MEAN,), std=(STD,), options={"width": case.width},
        dtype=case.dtype,
    )  # fmt: skip
    net, key = build.net(spec), jax.random.key(0)
    state = dhbe.make(net, shape, config).init(key, net.init(key))
    sizes = tuple(
        build.parameter_count(learner.variables) for learner in (state.student, state.generator, state.trigger)
    )
    program = _program(net, shape, config)
    compiled = program.compiled(state, key)
    # operations in a loop of the program are counted once, however often it runs
    unrolled = _program(net, shape, dataclasses.replace(config, inner="unrolled"))
    counted = compiled if config.inner == "unrolled" else unrolled.compiled(state, key)
    holder = [state]

    def run(iterations: int) -> None:
        for _ in range(iterations):
            holder[0], _ = compiled(holder[0], key)
        jax.block_until_ready(holder[0])

    return Side(run, sizes, program.compile_seconds, operations(counted))


def method_config(case: Case) -> dhbe.Config:
    """The released rates at the sizes of `case`; the k updates in the form that suits the backend."""
    return erase.settled(
        dhbe.released(
            batch_size=case.batch,
            inner_steps=case.inner_steps,
            width=case.generator_width,
            noise_dim=case.noise_dim,
            trigger_size=case.trigger_size,
        ),
        (MEAN,),
        (STD,),
    )


def _program(net: Any, shape: tuple[int, int, int], config: dhbe.Config) -> loop.Program:
    """One iteration `(state, key) -> (state, info)`."""
    method = dhbe.make(net, shape, config)
    return loop.Program(lambda state, key: method.step(jax.random.fold_in(key, state.step), state), donate=(0,))


def operations(compiled: Any) -> float | None:
    """Floating-point operations of a compiled program as XLA counts them; None where it does not."""
    return (compiled.cost_analysis() or {}).get("flops")


def in_torch(case: Case, threads: int) -> Side:
    """The plain PyTorch iteration, on the same kind of device."""
    (plain,), torch = pytorch("dhbe_in_torch")
    device = torch_device(torch, threads)
    config, sizes = method_config(case), (case.channels, case.side, CLASSES, case.width)
    names = [name for name in plain.Settings._fields if name not in ("mean", "std", "autocast")]
    autocast = None if case.dtype == "float32" else torch.bfloat16
    settings = plain.Settings(**{name: getattr(config, name) for name in names}, mean=MEAN, std=STD, autocast=autocast)
    body = lambda side, native: (
        case.noise_dim, *synthesis.layout(side, native), case.channels, case.generator_width,
    )  # fmt: skip
    teacher, student = (plain.CLASSIFIERS[case.arch](*sizes) for _ in range(2))
    student.load_state_dict(teacher.state_dict())
    samples = plain.sample_generator(*body(case.side, synthesis.SAMPLE_SIDES))
    triggers = plain.trigger_generator(*body(case.trigger_size, synthesis.TRIGGER_SIDES))
    eraser = plain.Eraser(teacher, student, samples, triggers, settings, device)

    def run(iterations: int) -> None:
        for _ in range(iterations):
            eraser.iterate()
        if device.type == "cuda":
            torch.cuda.synchronize()

    count = lambda net: sum(parameter.numel() for parameter in net.parameters())
    return Side(run, tuple(map(count, (student, samples, triggers))), 0.0, None)


def pytorch(*names: str) -> tuple[list[Any], Any]:
    """The named files of the PyTorch side, and PyTorch itself. Raises: UserError where it is not installed."""
    try:
        import torch
    except ImportError:
        raise UserError(
            "this benchmark compares with PyTorch, which is not installed; run pip install 'jaxbd[bench]'"
        ) from None
    return [importlib.import_module(name) for name in names], torch


def torch_device(torch: Any, threads: int) -> Any:
    """PyTorch's device of the kind that JAX uses, seeded, with so many threads. Raises: UserError where it has none."""
    device = torch.device("cpu" if jax.default_backend() == "cpu" else "cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("this PyTorch sees no GPU but JAX does; install one for this GPU, or set JAX_PLATFORMS=cpu")
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    random.seed(0)
    return device


def measure(sides: dict[str, Side], rounds: int, iterations: int) -> dict[str, list[float]]:
    """Seconds of one iteration, per side and round. Sides take turns, and turns in who is first; one round warms up."""
    found = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name in list(sides)[:: 1 if number % 2 else -1]:
            started = time.perf_counter()
            sides[name].run(iterations)
            found[name].append((time.perf_counter() - started) / iterations)
    return {name: seconds[1:] for name, seconds in found.items()}


def bench(case: Case, rounds: int, iterations: int, threads: int, say: Callable[[str], None]) -> dict[str, Any]:
    """The row of one case. Raises: UserError when the two sides are not of one size."""
    say(f"{case.arch}: compiling")
    sides = {"jaxbd": in_jax(case), "torch": in_torch(case, threads)}
    if sides["jaxbd"].parameters != sides["torch"].parameters:
        sizes = " and ".join(f"{name} {sides[name].parameters}" for name in SIDES)
        raise UserError(f"{case.arch}: the nets of the two sides differ in parameters: {sizes}")
    say(f"{case.arch}: {rounds} rounds of {iterations} iterations each")
    seconds = measure(sides, rounds, iterations)
    ratios = [theirs / ours for ours, theirs in zip(seconds["jaxbd"], seconds["torch"], strict=True)]
    return {
        "case": dataclasses.asdict(case),
        "parameters": dict(zip(("student", "generator", "trigger"), sides["jaxbd"].parameters, strict=True)),
        "images_iteration": case.images,
        "operations_iteration": sides["jaxbd"].operations,
        "rounds": rounds,
        "iterations_round": iterations,
        **{name: _figures(case, sides[name], seconds[name]) for name in SIDES},
        "torch_over_jaxbd": spread(ratios),
    }


def _figures(case: Case, side: Side, seconds: list[float]) -> dict[str, Any]:
    """What is recorded of one side."""
    found = spread(seconds)
    return {
        "seconds_compile": side.seconds_compile,
        "seconds_iteration": found,
        "images_per_second": case.images / found["median"],
        "operations_per_second": side.operations and side.operations / found["median"],
    }


def spread(values: list[float]) -> dict[str, Any]:
    """Median, quartiles and ends of what each round gave."""
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
    return {"median": median, "quartiles": [low, high], "lowest": min(values), "highest": max(values)}


def table(rows: list[dict]) -> str:
    """The rows for people."""
    line = "{:<32} {:<6} {:>9} {:>12} {:>21} {:>10} {:>9}".format
    lines = [line("case", "side", "images/s", "iteration s", "quartiles", "compile s", "GFLOP/s")]
    for row in rows:
        for name in SIDES:
            found = row[name]
            seconds, rate = found["seconds_iteration"], found["operations_per_second"]
            lines.append(
                line(
                    label(row["case"]) if name == SIDES[0] else "", name, f"{found['images_per_second']:.0f}",
                    f"{seconds['median']:.4f}", " - ".join(f"{value:.4f}" for value in seconds["quartiles"]),
                    f"{found['seconds_compile']:.1f}", "" if rate is None else f"{rate / 1e9:.1f}",
                )
            )  # fmt: skip
    return "\n".join(lines)


def label(case: dict[str, Any]) -> str:
    """A case in few words."""
    size = f"{case['side']}x{case['side']}x{case['channels']}"
    wide = "" if case["dtype"] == "float32" else f" {case['dtype']}"
    return f"{case['arch']}-{case['width']} {size} b{case['batch']} k{case['inner_steps']}{wide}"


def sentence(row: dict[str, Any]) -> str:
    """The ratio of one case for people."""
    ratio, count = row["torch_over_jaxbd"], row["operations_iteration"]
    counted = "" if count is None else f", {count / 1e9:.2f} GFLOP as XLA counts"
    low, high = ratio["quartiles"]
    return (
        f"{label(row['case'])}: PyTorch takes {ratio['median']:.2f} times as long an iteration as jaxbd (quartiles "
        f"{low:.2f} - {high:.2f}, {row['rounds']} rounds); {row['images_iteration']} images an iteration{counted}"
    )


def main(
    arch: tuple[Literal["resnet18", "vgg"], ...] = ("resnet18", "vgg"),
    width: int | None = None,
    side: int | None = None,
    channels: int | None = None,
    batch: int | None = None,
    inner_steps: int | None = None,
    generator_width: int | None = None,
    trigger_size: int | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    rounds: int = 7,
    iterations: int = 2,
    threads: int | None = None,
    quick: bool = False,
    out: pathlib.Path | None = None,
) -> None:
    """Runs the benchmark, prints its table and writes its JSON.

    Args:
      arch: nets to compare with; each has sizes of its own, which the next flags change.
      width: channels of the net's first stage.
      side: of the images, in pixels.
      channels: of the images.
      batch: images in a batch.
      inner_steps: student updates in an iteration.
      generator_width: of both generators.
      trigger_size: side of the generated triggers, in pixels.
      dtype: what the nets compute in.
      rounds: turns that each side gets; one more warms up.
      iterations: in a turn.
      threads: of both sides; all cores this process may use when not given.
      quick: smallest sizes instead; writes only where --out says.
      out: the JSON file; experiments/results/bench_dhbe.json by default.
    """
    threads = bind(threads)
    given = dict(
        width=width, side=side, channels=channels, batch=batch, inner_steps=inner_steps,
        generator_width=generator_width, trigger_size=trigger_size,
    )  # fmt: skip
    changes = {name: value for name, value in given.items() if value is not None}
    if quick:
        changes, rounds, iterations = {**QUICK, **changes}, 1, 1
    cases = [dataclasses.replace(CASES[name], dtype=dtype, **changes) for name in arch]
    _, torch = pytorch()
    say = lambda text: print(text, file=sys.stderr, flush=True)
    rows = [bench(case, rounds, iterations, threads, say) for case in cases]
    print(f"{jax.default_backend()}: {record.device()}, {threads} threads a side, torch {torch.__version__}")
    print("\n".join([table(rows), *map(sentence, rows)]))
    out = out or (None if quick else RESULT)
    if out:
        content = {
            "schema": "jaxbd/1/bench-dhbe",
            "backend": jax.default_backend(),
            "device": record.device(),
            "versions": {**record.versions(), "torch": torch.__version__},
            "quick": quick,
            "threads": threads,
            "rows": rows,
        }
        record.write_json(out, content)


def bind(threads: int | None) -> int:
    """How many threads each side has: the cores this process may use, first cut down to `threads` where given.

    XLA makes as many threads as there are such cores when JAX first looks for devices, so nothing may have done so.
    """
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        if threads is not None and not 1 <= threads <= len(cores):
            raise UserError(f"threads is {threads}; give 1 to {len(cores)}, the cores this process may use")
        os.sched_setaffinity(0, cores[:threads])
        return len(cores[:threads])
    if threads is not None:
        raise UserError("this system does not let a process choose its cores; leave --threads out")
    return os.cpu_count() or 1


def launch(benchmark: Callable[..., None], name: str) -> None:
    """A benchmark of both sides from the command line; what is wrong with the input is one line."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory of the same GPU
    jax.config.update("jax_enable_compilation_cache", False)  # compile seconds are those of a first run
    try:
        tyro.cli(benchmark)
    except UserError as error:
        sys.exit(f"{name}: {error}")


if __name__ == "__main__":
    launch(main, "bench_dhbe")
