"""How far classes lie apart and how much triggers change: why a backdoor is told from a class by
its size.

Claims (Yan et al. 2023, section 4.3.1): the nearest two classes are far apart (Table 2,
sliced-Wasserstein distances), and triggers of every family change far less (Table 1).

    python -m experiments.dhbe.dhbe_distances    # digits, and CIFAR-10 images where there are some
    python -m experiments.dhbe.dhbe_distances --smoke

The paper does not say how long its directions are, so distances between classes are given as pixel
changes, see `distances.as_pixel_changes`. The measured changes of triggers are those on real
images.
"""

from typing import Any

import jax
import numpy as np

from experiments import units
from experiments.dhbe import dhbe_cases
from experiments.scale import bench
from jaxbd.attacks import badnets, blend, single_pixel, sinusoid, steganography
from jaxbd.base import Attack, Batch, Dataset
from jaxbd.data import digits, load
from jaxbd.metrics import distances

NAME, IMAGES, PROJECTIONS = "dhbe/distances", 2000, 512


def sets() -> dict[str, Dataset]:
    """The data sets that are there, by name."""
    found = {"digits": digits.load(dhbe_cases.DIGIT_SIDE)}
    if (units.SHARED / "data" / "cifar10").is_dir():
        found["CIFAR-10"] = load.load(bench.data_source("narrow", None), split="test")
    return found


def classes(name: str, dataset: Dataset, projections: int = PROJECTIONS) -> dict[str, Any]:
    """A line of Table 2."""
    data = load.as_batch(dataset)
    names = dataset.class_names
    found = distances.closest(
        distances.class_distances(jax.random.key(0), data, len(names), projections=projections)
    )
    pixels = int(np.prod(data.images.shape[1:]))
    return {
        "data": name,
        "closest": f"{names[found.one]} - {names[found.other]}",
        "distance": found.distance,
        "mean": found.mean,
        "closest, pixel changes": distances.as_pixel_changes(found.distance, pixels),
        "mean, pixel changes": distances.as_pixel_changes(found.mean, pixels),
    }


def triggers(name: str, dataset: Dataset, images: int = IMAGES) -> list[dict[str, Any]]:
    """Lines of Table 1: what the closed form says of a trigger and what it changes on real
    images."""
    data = load.as_batch(dataset)
    data = Batch(data.images[:images], data.labels[:images])
    _, height, width, channels = data.images.shape
    shape = (height, width, channels)
    square, sine = (
        badnets.Config(pattern="checkerboard", place="fixed"),
        sinusoid.Config(period=6.0),
    )
    mark, bits = blend.Config(opacity=0.1), steganography.Config(bits=2)
    watermark = blend.make(shape, 10, mark)
    picture = np.asarray(watermark.init(jax.random.key(1)).pattern)
    made = {
        "one pixel": (
            single_pixel.make(shape, 10, single_pixel.Config()),
            distances.pixel(1, channels),
        ),
        "3x3 checkerboard": (badnets.make(shape, 10, square), distances.square(3, channels)),
        "watermark, opacity 0.1": (watermark, distances.watermark(picture, 0.1)),
        f"sinusoid, {sine.size}/255": (
            sinusoid.make(shape, 10, sine),
            distances.sinusoid(shape, sine.size / 255),
        ),
        "2 low bits": (
            steganography.make(shape, 10, bits),
            distances.steganography(shape, 2, repeated=True),
        ),
    }
    return [
        _trigger_row(name, kind, attack, stated, data) for kind, (attack, stated) in made.items()
    ]


def _trigger_row(
    name: str, kind: str, attack: Attack, stated: float, data: Batch
) -> dict[str, Any]:
    trigger = attack.init(jax.random.key(1))
    changes = distances.pixel_changes(jax.random.key(2), attack.stamp, trigger, data)
    return {"data": name, "trigger": kind, "closed form": stated, "measured": float(changes.mean())}


def unit() -> dict[str, Any]:
    """Both tables, kept under `runs/`."""
    found = sets()
    work = lambda: {
        "classes": [classes(name, dataset) for name, dataset in found.items()],
        "triggers": [row for name, dataset in found.items() for row in triggers(name, dataset)],
    }
    return units.unit(
        NAME, "tables", [IMAGES, PROJECTIONS, dhbe_cases.DIGIT_SIDE, sorted(found)], work
    )


def main(smoke: bool = False) -> None:
    """Runs the experiment and prints its tables."""
    units.use_cache()
    if smoke:
        print(units.table([classes("digits", digits.load(dhbe_cases.DIGIT_SIDE), 4)]), "\n")
        print(units.table(triggers("digits", digits.load(dhbe_cases.DIGIT_SIDE), 50)))
        return
    for rows in unit().values():
        print(units.table(rows), "\n")


if __name__ == "__main__":
    units.cli(main)
