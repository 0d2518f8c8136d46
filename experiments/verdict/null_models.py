"""A calibration of small clean nets of several architectures, scanned to the end.

    python -m experiments.verdict.null_models            # an hour on 2 cores; resumes
    python -m experiments.verdict.null_models --smoke    # two nets, few steps; writes nothing

Writes the calibration that comes with the package, for `jaxbd scan --calibration small-nets`, and
the record `experiments/results/calibration.json`. Every net trains on a random part of the images
and is scanned with others. None is one of the models that verdicts are measured on, and seeds 600
to 631 serve nothing else. Each net is a unit in `experiments/results/units/`, so that several
sessions and machines add up; the table says which nets other code has measured.
"""

import dataclasses
import time
from typing import Any, NamedTuple

import jax

from experiments import units
from experiments.papers import ledger
from experiments.scale import bench
from jaxbd import files
from jaxbd.base import Batch, UserError
from jaxbd.data import digits, draw, load
from jaxbd.detection import calibration as nulls
from jaxbd.metrics import evaluate
from jaxbd.models import build
from jaxbd.pipelines import calibrate, plant, scan
from jaxbd.training import supervised

NAME, MODULE = "verdict/null", "experiments.verdict.null_models"
"""Folder of the units, and this module, which is `__main__` where it runs as a program."""
FIRST = 600
SEARCHED, JUDGED = 1500, 500
"""Images that a scan of CIFAR-10 nets searches with and is judged by; of digits a part of that."""


class Kind(NamedTuple):
    """Nets that differ by seed and training images alone.

    Attributes:
      data: "digits" (16x16, grey) or "cifar10".
      images: of each net's training; steps and batching of it.
    """

    count: int
    arch: str
    options: dict[str, Any]
    data: str
    images: int
    steps: int
    batching: draw.Batching


DIGITS, CIFAR = draw.Batching(), draw.Batching(crop_padding=4, flip=True)
KINDS = (
    Kind(5, "cnn", {"width": 8}, "digits", 900, 600, DIGITS),
    Kind(5, "cnn", {"width": 12}, "digits", 900, 600, DIGITS),
    Kind(2, "resnet18", {"width": 8}, "digits", 900, 400, DIGITS),
    Kind(9, "cnn", {"width": 16}, "cifar10", 10_000, 800, CIFAR),
    Kind(5, "vgg", {"width": 16}, "cifar10", 10_000, 800, CIFAR),
    Kind(4, "resnet18", {"width": 8}, "cifar10", 10_000, 800, CIFAR),
    Kind(2, "wrn16-1", {}, "cifar10", 10_000, 800, CIFAR),
)


def plan() -> list[tuple[int, Kind]]:
    """(seed, kind) of every net."""
    kinds = [kind for kind in KINDS for _ in range(kind.count)]
    return list(enumerate(kinds, FIRST))


def _divide(kind: Kind, seed: int) -> tuple[Batch, Batch, Batch]:
    """(images that train, that search, that judge)."""
    if kind.data == "digits":
        return draw.divide(digits.load(16), kind.images, 500, seed=seed)
    source = bench.data_source("cpu", None)
    train = load.load(source, split="train", limit=kind.images, seed=seed)
    held = load.load(source, split="test", limit=SEARCHED + JUDGED, seed=seed)
    parts = (train, *load.split(held, SEARCHED, seed))
    first, second, third = (load.as_batch(part) for part in parts)
    return first, second, third


def one(seed: int, kind: Kind, steps: int | None = None) -> dict[str, Any]:
    """Trains the net of a seed and scans it.

    Args:
      steps: of training and of each stage of the scan; None for those of the kind.
    """
    side, channels = (16, 1) if kind.data == "digits" else (32, 3)
    spec = build.Spec(
        arch=kind.arch, classes=10, image_shape=(side, side, channels), options=kind.options
    )
    train, search, judge = _divide(kind, seed)
    key, run, net = jax.random.key(seed), units.start_run(NAME), build.net(spec)
    training = supervised.Config(num_steps=steps or kind.steps)
    trained = plant.train(
        run, "train", jax.random.fold_in(key, 2), net, train, training, batching=kind.batching
    )
    config = calibrate.for_calibration(scan.PRESETS["quick"])
    if steps:
        config = dataclasses.replace(config, steps=steps, locate_steps=steps)
    suspect = bench.suspect_of(spec, trained.variables)
    found = scan.scan(run, jax.random.key(0), suspect.freeze(), search, judge, config)
    accuracy = evaluate.rates(key, net, trained.variables, judge).clean_accuracy
    name = f"{kind.data} {kind.arch} {kind.options.get('width', '')} seed {seed}"
    scored = calibrate.score(" ".join(name.split()), kind.arch, found)
    return {"accuracy": accuracy, "scored": scored._asdict()}


def take_or_measure(
    seed: int, kind: Kind, settings: dict[str, Any], *, renew: bool = False
) -> dict[str, Any]:
    """What `one` finds; from the committed units if a net was measured with these settings.

    Args:
      renew: measure a net again that other code has measured.
    """
    stated = {"seed": seed, "kind": files.plain(kind._asdict()), "scan": settings}
    unit = ledger.Unit(NAME, str(seed), stated, (MODULE,))
    stored = ledger.find(unit)
    if stored is not None and not (renew and stored.is_older):
        return {**stored.result, "code": "older" if stored.is_older else "today's"}
    units.say(f"{NAME}/{seed}: running")
    started = time.perf_counter()
    found = files.plain(one(seed, kind))
    ledger.write(unit, found, time.perf_counter() - started)
    return {**found, "code": "today's"}


def _row(found: dict[str, Any]) -> dict[str, Any]:
    """A line of the table."""
    scored = found["scored"]
    alarms = [rule for rule, alarm in scored["alarms"].items() if alarm]
    figures = {name: scored["statistics"].get(name) for name in (nulls.MARGIN, nulls.ANOMALY)}
    return {
        "net": scored["name"],
        "accuracy": found["accuracy"],
        **figures,
        "alarms": ", ".join(alarms) or "none",
        "code": found.get("code"),
    }


def main(smoke: bool = False, renew: bool = False) -> None:
    """Trains and scans the nets, prints their table and the rate of each rule's false alarms.

    Args:
      smoke: two nets, few steps; nothing is written.
      renew: also measure nets again that other code has measured.
    """
    if smoke:
        print(units.table([_row(one(FIRST, KINDS[0], 20)), _row(one(FIRST + 1, KINDS[1], 20))]))
        return
    if not units.SHARED.joinpath("data", "cifar10").is_dir():
        raise UserError("CIFAR-10 is not there; put it into shared/data/cifar10")
    config = calibrate.for_calibration(scan.PRESETS["quick"])
    settings = calibrate.settings_of(config)
    found = [take_or_measure(seed, kind, settings, renew=renew) for seed, kind in plan()]
    models = tuple(nulls.CleanModel(**each["scored"]) for each in found)
    known = nulls.Calibration(models, settings)
    rules = sorted({rule for model in models for rule in model.alarms})
    rates = [{"rule": rule, **nulls.false_alarms(known, rule)._asdict()} for rule in rules]
    rows = [_row(each) for each in found]
    tables = {"Clean small nets": rows, "Alarms on clean small nets": rates}
    nulls.save(nulls.SHIPPED["small-nets"], known)
    record = {
        "command": "python -m experiments.verdict.null_models",
        "tables": tables,
        "settings": settings,
        "versions": files.versions(),
        "device": files.device(),
    }
    files.write_json(units.RESULTS / "calibration.json", record)
    for title, table in tables.items():
        print(f"\n{title}\n{units.table(table)}")


if __name__ == "__main__":
    units.cli(main)
