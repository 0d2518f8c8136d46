"""The queue of `scripts/accelerator`: what runs on an accelerator, in order of value.

An item is a process. Its words follow the interpreter; in them `{out}` is the JSON file it has to
write, `{data}` and `{models}` are where real images and published models lie under `{shared}`,
`{runs}` is a folder for all items of a run, `{part}` is one that comes back and is there again on
the next machine.
"""

from collections.abc import Container, Iterable
from typing import NamedTuple

from experiments.accelerator.needs import Need

BENCH, DHBE = "scripts/bench_scale.py", "scripts/bench_dhbe.py"
PACKAGE = "experiments.accelerator"


class Item(NamedTuple):
    """One process of the queue.

    Attributes:
      name: of its record.
      words: the arguments of the interpreter.
      dry: the same at toy size, on a CPU.
      seconds: the most it may take.
      needs: what must be there.
      environment: variables of its process.
      resumes: whether its `{part}` folder comes back, so that a later run goes on.
    """

    name: str
    words: tuple[str, ...]
    dry: tuple[str, ...]
    seconds: int
    needs: tuple[Need, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    resumes: bool = False


NO_AUTOTUNING = (("XLA_FLAGS", "--xla_gpu_autotune_level=0"),)
FULL_TESTS = (
    "tests/test_oracles.py",
    "tests/test_contracts.py",
    "tests/training/test_transforms.py",
)


def _module(name: str, *words: str) -> tuple[str, ...]:
    return ("-m", f"{PACKAGE}.{name}", "--out", "{out}", *words)


def bench(name: str, seconds: int, *words: str, steps: int = 20) -> Item:
    """A case of `bench_scale`, beside eager and compiled PyTorch in the same process."""
    common = (BENCH, "--out", "{out}", *words)
    forms = ("--torch", "eager", "channels-last", "compiled")
    full = (*common, "--rounds", "3", "--steps", str(steps), *forms)
    dry = (*common, "--quick", "--batch", "4", "--torch", "eager")
    return Item(name, full, dry, seconds, ("torch",))


def _sweeps() -> list[Item]:
    wide = ("--task", "mesa", "--arch", "resnet18", "--batch", "128")
    small = [("mesa", arch) for arch in ("wrn16-1", "vgg")]
    steps = [("training", "resnet18"), ("cleanse", "resnet18"), ("margin", "resnet18")]
    return [
        bench("mesa-resnet18-f32", 180, *wide, "--dtype", "float32", steps=3),
        bench("mesa-resnet18-bf16", 180, *wide, "--dtype", "bfloat16", steps=3),
        *(bench(f"{task}-{arch}", 90, "--task", task, "--arch", arch) for task, arch in small),
        *(
            bench(f"{task}-{arch}", 90, "--task", task, "--arch", arch, "--batch", "128", steps=5)
            for task, arch in steps
        ),
    ]


def _dhbe() -> Item:
    words = (DHBE, "--out", "{out}", "--arch", "resnet18")
    sizes = ("--width", "64", "--batch", "256", "--inner-steps", "5", "--dtype", "bfloat16")
    forms = ("--torch", "eager", "channels-last")
    full = (*words, *sizes, *forms, "--rounds", "3", "--iterations", "2")
    return Item("dhbe-iteration", full, (*words, "--quick"), 90, ("torch",))


def _scans() -> list[Item]:
    """Both published models in two processes each, the first with an empty compile cache; one of
    them by the released preset, with and without retiring, and without autotuning."""
    needs: tuple[Need, ...] = ("data", "models")
    files = {"badnets": "badnets_8_02_ckpt.pth", "l2-inv": "l2_inv_0_02_ckpt.pth"}
    words = {
        name: _module("scanning", "--model", f"{{models}}/ibau/{file}", "--data", "{data}")
        for name, file in files.items()
    }
    short = ("--", "--steps", "2", "--locate-steps", "2", "--limit", "200")
    tiny = ("--targets", "8", "--steps", "2", "--limit", "200", "--mesa.hidden", "8")
    every = [Item(f"scan-{name}", own, (*own, *short), 120, needs) for name, own in words.items()]
    once = (*words["badnets"], "--once")
    for name, flag in (("full", "--no-retire"), ("retiring", "--retire")):
        full = (*once, "--", "--preset", "released", flag)
        every.append(Item(f"released-{name}", full, (*full, *tiny), 150, needs))
    untuned = Item("scan-untuned", once, (*once, *short), 90, needs, NO_AUTOTUNING)
    return [*every, untuned]


def _papers() -> list[Item]:
    """Full-size nets, by priority; `papers.UNITS` says what they are."""
    from experiments.accelerator.papers import UNITS

    found = []
    for name, unit in UNITS.items():
        folder = "{part}" if unit.resumes else "{runs}"
        words = _module("papers", "--unit", name, "--shared", "{shared}", "--runs", folder)
        item = Item(f"paper-{name}", words, (*words, "--toy"), unit.seconds, unit.needs)
        found.append(item._replace(resumes=unit.resumes))
    return found


def queue() -> list[Item]:
    """Every item, the most valuable first."""
    return [
        Item("device", _module("device"), _module("device", "--quick"), 60, ()),
        Item(
            "tests",
            _module("suite", *FULL_TESTS),
            _module("suite", "tests/test_images.py"),
            240,
            (),
            (("JAX_PLATFORMS", "cuda,cpu"), ("JAXBD_DEVICES", "1")),
        ),
        *_sweeps(),
        _dhbe(),
        Item("bna-step", _module("steps"), _module("steps", "--quick"), 60),
        *_scans(),
        Item(
            "memory",
            _module("memory"),
            _module("memory", "--quick"),
            150,
            environment=(("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.1"),),
        ),
        Item(
            "paste",
            ("scripts/bench_paste.py", "--out", "{out}"),
            ("scripts/bench_paste.py", "--quick", "--out", "{out}"),
            60,
        ),
        Item(
            "ways",
            ("scripts/bench_time_loops.py", "--out", "{out}"),
            ("scripts/bench_time_loops.py", "--quick", "--out", "{out}"),
            120,
        ),
        *_papers(),
    ]


def pending(items: Iterable[Item], done: Container[str], only: Container[str] = ()) -> list[Item]:
    """The items that still have to run: those without a record, or those named in `only`."""
    if only:
        return [item for item in items if item.name in only]
    return [item for item in items if item.name not in done]


def fill(words: Iterable[str], places: dict[str, str]) -> list[str]:
    """`words` with the names of files and folders in place of `{out}`, `{data}` and the like."""
    filled = []
    for word in words:
        for name, place in places.items():
            word = word.replace(f"{{{name}}}", place)
        filled.append(word)
    return filled
