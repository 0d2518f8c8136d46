"""How much sooner the verdict is there: one program with retiring cells against PyTorch's cells one
after another.

A victim of each architecture is planted in handwritten digits, 16x16 pixels in three equal
channels, and scanned with MESA, 10 classes x 3 levels at batch 32, in full and with settled cells
retired. PyTorch's time is of its own sweep, measured in the same process: the seconds of a step of
all 30 cells, times the steps of a full scan.

    python -m experiments.scale.race
"""

import dataclasses
import time
from typing import Any, Literal

import jax
import numpy as np

from experiments import units
from experiments.mesa.digits_five_seeds import Settings
from experiments.scale import bench, retire
from jaxbd.attacks import badnets
from jaxbd.base import Batch, Key
from jaxbd.data import digits, draw
from jaxbd.models import build
from jaxbd.pipelines import compare, plant, scan

NAME = "scale/race"
Arch = Literal["wrn16-1", "vgg"]
ARCHS: tuple[Arch, ...] = ("wrn16-1", "vgg")
SIDE, SEED, TARGET, ROUNDS = 16, 0, 0, 3


def colour(batch: Batch) -> Batch:
    """Grey images [N, H, W, 1] in three channels."""
    return batch._replace(images=np.repeat(np.asarray(batch.images), 3, axis=-1))


def plant_victim(arch: Arch, width: int, settings: Settings) -> tuple[compare.Case, Key]:
    """A victim, and its key."""
    shape, key = (SIDE, SIDE, 3), jax.random.key(SEED)
    parts = draw.divide(digits.load(SIDE), settings.train_rows, settings.defence_rows, seed=SEED)
    train, defence, test = map(colour, parts)
    spec = build.Spec(arch=arch, classes=10, image_shape=shape, options={"width": width})
    attack = badnets.make(shape, 10, dataclasses.replace(settings.attack, target=TARGET))
    trigger = attack.init(jax.random.fold_in(key, 1))
    trained = plant.train(
        units.start_run(NAME),
        "train",
        jax.random.fold_in(key, 2),
        build.net(spec),
        train,
        settings.training,
        attack=(attack, trigger),
    )
    suspect = bench.suspect_of(spec, trained.variables)
    return compare.Case(suspect, attack, trigger, TARGET, defence, test), key


def one(
    arch: Arch, width: int, settings: Settings, configs: dict[str, scan.ScanConfig]
) -> dict[str, Any]:
    """Both scans and PyTorch's time."""
    case, key = plant_victim(arch, width, settings)
    suspect = case.victim.freeze()
    row: dict[str, Any] = {"net": f"{arch}-{width}", "planted": TARGET}
    for way, config in configs.items():
        started, run = time.perf_counter(), units.start_run(NAME)
        scan_key = jax.random.fold_in(key, 4)
        found = scan.scan(run, scan_key, suspect, case.defence, case.test, config)
        words = [found.decision.verdict, *map(str, found.decision.targets)]
        row[f"verdict, {way}"] = " ".join(words)
        row[f"image-steps, {way}"] = found.image_steps
        row[f"seconds, {way}"] = time.perf_counter() - started - found.seconds.compile
    full = configs["full"]
    row["seconds, PyTorch"] = full.steps * in_torch(arch, width, full)
    row["PyTorch / retiring"] = row["seconds, PyTorch"] / row["seconds, retiring"]
    return row


def in_torch(arch: Arch, width: int, config: scan.ScanConfig) -> float:
    """Median seconds of one step of all cells in PyTorch, on all cores."""
    scale, dhbe = units.script("bench_scale"), units.script("bench_dhbe")
    sizes = {
        "side": SIDE,
        "batch": config.batch_size,
        "levels": config.levels,
        "hidden": config.mesa.hidden,
        "width": width,
    }
    side = scale.in_torch(scale.case_of("mesa", arch, **sizes), dhbe.bind(None))
    return dhbe.spread(dhbe.measure({"torch": side}, ROUNDS, 2)["torch"])["median"]


def run() -> dict[str, Any]:
    """Resumable: a row per architecture."""
    settings, widths = Settings(), {"wrn16-1": 16, "vgg": 32}
    configs = retire.configs(settings)
    known = [
        units.settings_of(settings),
        {way: units.settings_of(config) for way, config in configs.items()},
        ROUNDS,
    ]
    rows = [
        units.unit(
            NAME,
            arch,
            [arch, known],
            lambda arch=arch: one(arch, widths[arch], settings, configs),
        )
        for arch in ARCHS
    ]
    return {"rows": rows}


def main() -> None:
    """Runs the race and prints its table."""
    units.use_cache()
    print(units.table(run()["rows"]))


if __name__ == "__main__":
    units.cli(main)
