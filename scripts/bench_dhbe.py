"""Measures one full DHBE iteration against a plain PyTorch one: same machine, same run, same sizes.

An iteration is k updates of the student and one of each generator. Both sides take turns, so that
whatever else the machine does falls on both; compiling is apart. The PyTorch side is
`dhbe_in_torch.py` and runs as it is written, op by op. Images per second are those that pass the
student with a gradient of its weights: k batches of generated images and k of triggered ones an
iteration. Floating-point operations are counted by XLA in the compiled iteration.

    python scripts/bench_dhbe.py            # a narrow ResNet-18 and a small VGG; minutes on 2 cores
    python scripts/bench_dhbe.py --arch resnet18 --width 64 --batch 256 --dtype bfloat16
    python scripts/bench_dhbe.py --quick    # checks that it runs, its figures mean nothing
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

from jaxbd import files
from jaxbd.base import Problem, RepairData, Suspect, UserError
from jaxbd.models import build, synthesis
from jaxbd.pipelines import erase
from jaxbd.repairs import dhbe
from jaxbd.training.program import Program

RESULT = pathlib.Path(__file__).resolve().parents[1] / "experiments" / "results" / "bench_dhbe.json"
CLASSES = 10
MEAN, STD = 0.5, 0.25
"""Input normalisation of the nets, every channel."""
Form = Literal["eager", "channels-last", "bfloat16", "compiled"]
NAMES: dict[Form, str] = {
    "eager": "torch",
    "channels-last": "torch_channels_last",
    "bfloat16": "torch_bfloat16",
    "compiled": "torch_compiled",
}
"""Form of PyTorch -> what its side is called in records. "eager": channels first; "channels-last":
the same numbers with channels innermost; "bfloat16": that, with the nets in autocast; "compiled":
eager, but the net is compiled by `torch.compile` (in `bench_scale.py` alone)."""
FORMS: tuple[Form, ...] = ("eager", "channels-last", "bfloat16")


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
QUICK = {
    "side": 8,
    "width": 4,
    "batch": 4,
    "inner_steps": 2,
    "generator_width": 4,
    "noise_dim": 8,
    "trigger_size": 3,
}


class Side(NamedTuple):
    """One way to do an iteration.

    Attributes:
      run: does so many iterations and returns when they are done.
      parameters: of student, sample generator and trigger generator.
      seconds_compile: before the first one; what there is to compile.
      operations: floating-point operations of one, where known.
    """

    run: Callable[[int], Any]
    parameters: tuple[int, ...]
    seconds_compile: float
    operations: float | None


def in_jax(case: Case) -> Side:
    """This package's iteration, compiled."""
    shape, config = (case.side, case.side, case.channels), method_config(case)
    net, key = build.net(spec_of(case)), jax.random.key(0)
    problem = Problem(net, shape, CLASSES, (MEAN,), (STD,))
    state = dhbe.make(problem, config).init(key, net.init(key), RepairData())
    count = lambda learner: build.parameter_count(learner.variables)
    sizes = count(state.student), count(state.generator), count(state.trigger)
    program = _program(problem, config)
    compiled = program.compiled(state, key)
    # operations in a loop of the program are counted once, however often it runs
    unrolled = _program(problem, dataclasses.replace(config, inner="unrolled"))
    counted = compiled if config.inner == "unrolled" else unrolled.compiled(state, key)
    holder = [state]

    def run(iterations: int) -> None:
        for _ in range(iterations):
            holder[0], _ = compiled(holder[0], key)
        jax.block_until_ready(holder[0])

    return Side(run, sizes, program.compile_seconds, operations(counted))


def method_config(case: Case) -> dhbe.Config:
    """The released rates at the sizes of `case`; the k updates in the form that suits the
    backend."""
    config = dhbe.released(
        batch_size=case.batch,
        inner_steps=case.inner_steps,
        width=case.generator_width,
        noise_dim=case.noise_dim,
        trigger_size=case.trigger_size,
    )
    shape = (case.side, case.side, case.channels)
    suspect = Suspect(build.net(spec_of(case)), {}, shape, CLASSES, (MEAN,), (STD,))
    return erase.adapt(config, suspect)


def spec_of(case: Case) -> build.Spec:
    """The net of teacher and student."""
    return build.Spec(
        arch=case.arch,
        classes=CLASSES,
        image_shape=(case.side, case.side, case.channels),
        mean=(MEAN,),
        std=(STD,),
        options={"width": case.width},
        dtype=case.dtype,
    )


def _program(problem: Problem, config: dhbe.Config) -> Program:
    """One iteration `(state, key) -> (state, info)`."""
    (phase,) = dhbe.make(problem, config).phases
    return Program(
        lambda state, key: phase.step(jax.random.fold_in(key, state.step), state, None), donate=(0,)
    )


def operations(compiled: Any) -> float | None:
    """Floating-point operations of a compiled program as XLA counts them; None where it does
    not."""
    return (compiled.cost_analysis() or {}).get("flops")


def in_torch(case: Case, threads: int, form: Form = "eager") -> Side:
    """The plain PyTorch iteration, on the same kind of device."""
    (plain,), torch = pytorch("dhbe_in_torch")
    device = torch_device(torch, threads)
    config, sizes = method_config(case), (case.channels, case.side, CLASSES, case.width)
    names = [name for name in plain.Settings._fields if name not in ("mean", "std", "autocast")]
    autocast = torch.bfloat16 if "bfloat16" in (case.dtype, form) else None
    settings = plain.Settings(
        **{name: getattr(config, name) for name in names}, mean=MEAN, std=STD, autocast=autocast
    )
    body = lambda side, native: (
        case.noise_dim,
        *synthesis.layout(side, native),
        case.channels,
        case.generator_width,
    )
    teacher, student = (plain.CLASSIFIERS[case.arch](*sizes) for _ in range(2))
    student.load_state_dict(teacher.state_dict())
    samples = plain.sample_generator(*body(case.side, synthesis.SAMPLE_SIDES))
    triggers = plain.trigger_generator(*body(case.trigger_size, synthesis.TRIGGER_SIDES))
    if form in ("channels-last", "bfloat16"):  # what convolutions put out follows their weights
        for net in (teacher, student, samples, triggers):
            net.to(memory_format=torch.channels_last)
    eraser = plain.Eraser(teacher, student, samples, triggers, settings, device)

    def run(iterations: int) -> None:
        for _ in range(iterations):
            eraser.iterate()
        if device.type == "cuda":
            torch.cuda.synchronize()

    count = lambda net: sum(parameter.numel() for parameter in net.parameters())
    return Side(run, tuple(map(count, (student, samples, triggers))), 0.0, None)


def pytorch(*names: str) -> tuple[list[Any], Any]:
    """The named files of the PyTorch side, and PyTorch itself. Raises: UserError where it is not
    installed."""
    try:
        import torch
    except ImportError:
        raise UserError(
            "this benchmark compares with PyTorch, which is not installed; run pip install"
            " 'jaxbd[bench]'"
        ) from None
    return [importlib.import_module(name) for name in names], torch


def torch_device(torch: Any, threads: int) -> Any:
    """PyTorch's device of the kind that JAX uses, seeded, with so many threads. Raises: UserError
    where it has none."""
    device = torch.device("cpu" if jax.default_backend() == "cpu" else "cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "this PyTorch sees no GPU but JAX does; install one for this GPU, or set"
            " JAX_PLATFORMS=cpu"
        )
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    random.seed(0)
    return device


def time_once(work: Callable[[], Any]) -> float:
    """Wall seconds of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(sides: dict[str, Side], rounds: int, iterations: int) -> dict[str, list[float]]:
    """Seconds of one iteration, per side and round. Sides take turns, and turns in who is first;
    one round warms up."""
    found = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name in list(sides)[:: 1 if number % 2 else -1]:
            started = time.perf_counter()
            sides[name].run(iterations)
            found[name].append((time.perf_counter() - started) / iterations)
    return {name: seconds[1:] for name, seconds in found.items()}


def bench(
    case: Case,
    rounds: int,
    iterations: int,
    threads: int,
    say: Callable[[str], None],
    forms: tuple[Form, ...] = ("eager",),
) -> dict[str, Any]:
    """The row of one case. Raises: UserError when the two sides are not of one size."""
    say(f"{case.arch}: compiling")
    sides = {"jaxbd": in_jax(case)}
    sides |= {NAMES[form]: in_torch(case, threads, form) for form in forms}
    if len({side.parameters for side in sides.values()}) > 1:
        sizes = " and ".join(f"{name} {side.parameters}" for name, side in sides.items())
        raise UserError(f"{case.arch}: the nets of the two sides differ in parameters: {sizes}")
    say(f"{case.arch}: {rounds} rounds of {iterations} iterations each")
    seconds = measure(sides, rounds, iterations)
    over = {
        name: spread([theirs / ours for ours, theirs in zip(seconds["jaxbd"], each, strict=True)])
        for name, each in seconds.items()
        if name != "jaxbd"
    }
    return {
        "case": dataclasses.asdict(case),
        "parameters": dict(
            zip(("student", "generator", "trigger"), sides["jaxbd"].parameters, strict=True)
        ),
        "images_iteration": case.images,
        "operations_iteration": sides["jaxbd"].operations,
        "rounds": rounds,
        "iterations_round": iterations,
        **{name: _figures(case, side, seconds[name]) for name, side in sides.items()},
        **{f"{name}_over_jaxbd": ratio for name, ratio in over.items()},
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
    return {
        "median": median,
        "quartiles": [low, high],
        "lowest": min(values),
        "highest": max(values),
    }


def table(rows: list[dict]) -> str:
    """The rows for people."""
    line = "{:<32} {:<19} {:>9} {:>12} {:>21} {:>10} {:>9}".format
    lines = [line("case", "side", "images/s", "iteration s", "quartiles", "compile s", "GFLOP/s")]
    for row in rows:
        for name in [name for name in ("jaxbd", *NAMES.values()) if name in row]:
            found = row[name]
            seconds, rate = found["seconds_iteration"], found["operations_per_second"]
            lines.append(
                line(
                    label(row["case"]) if name == "jaxbd" else "",
                    name,
                    f"{found['images_per_second']:.0f}",
                    f"{seconds['median']:.4f}",
                    " - ".join(f"{value:.4f}" for value in seconds["quartiles"]),
                    f"{found['seconds_compile']:.1f}",
                    "" if rate is None else f"{rate / 1e9:.1f}",
                )
            )
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
        f"{label(row['case'])}: PyTorch takes {ratio['median']:.2f} times as long an iteration as"
        f" jaxbd (quartiles {low:.2f} - {high:.2f}, {row['rounds']} rounds);"
        f" {row['images_iteration']} images an iteration{counted}"
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
    torch: tuple[Form, ...] = FORMS,
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
      torch: PyTorch's forms, see `NAMES`; "eager" is what ratios are of.
      quick: smallest sizes instead; writes only where --out says.
      out: the JSON file; experiments/results/bench_dhbe.json by default.
    """
    threads = bind(threads)
    given = dict(
        width=width,
        side=side,
        channels=channels,
        batch=batch,
        inner_steps=inner_steps,
        generator_width=generator_width,
        trigger_size=trigger_size,
    )
    changes = {name: value for name, value in given.items() if value is not None}
    if quick:
        changes, rounds, iterations = {**QUICK, **changes}, 1, 1
    cases = [dataclasses.replace(CASES[name], dtype=dtype, **changes) for name in arch]
    if "eager" not in torch or "compiled" in torch:
        raise UserError(
            f"--torch is {' '.join(torch)}; give eager, and of the others all but compiled"
        )
    _, module = pytorch()
    say = lambda text: print(text, file=sys.stderr, flush=True)
    rows = [bench(case, rounds, iterations, threads, say, torch) for case in cases]
    print(
        f"{jax.default_backend()}: {files.device()}, {threads} threads a side, torch"
        f" {module.__version__}"
    )
    print("\n".join([table(rows), *map(sentence, rows)]))
    out = out or (None if quick else RESULT)
    if out:
        content = {
            "schema": "jaxbd/1/bench-dhbe",
            "backend": jax.default_backend(),
            "device": files.device(),
            "versions": {**files.versions(), "torch": module.__version__},
            "quick": quick,
            "threads": threads,
            "rows": rows,
        }
        files.write_json(out, content)


def bind(threads: int | None) -> int:
    """How many threads each side has: the cores this process may use, first cut down to `threads`
    where given.

    XLA makes as many threads as there are such cores when JAX first looks for devices, so nothing
    may have done so.
    """
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        if threads is not None and not 1 <= threads <= len(cores):
            raise UserError(
                f"threads is {threads}; give 1 to {len(cores)}, the cores this process may use"
            )
        os.sched_setaffinity(0, cores[:threads])
        return len(cores[:threads])
    if threads is not None:
        raise UserError("this system does not let a process choose its cores; leave --threads out")
    return os.cpu_count() or 1


def launch(benchmark: Callable[..., None], name: str) -> None:
    """A benchmark of both sides from the command line; what is wrong with the input is one line."""
    os.environ.setdefault(
        "XLA_PYTHON_CLIENT_PREALLOCATE", "false"
    )  # PyTorch needs memory of the same GPU
    jax.config.update(
        "jax_enable_compilation_cache", False
    )  # compile seconds are those of a first run
    try:
        tyro.cli(benchmark)
    except UserError as error:
        sys.exit(f"{name}: {error}")


if __name__ == "__main__":
    launch(main, "bench_dhbe")
