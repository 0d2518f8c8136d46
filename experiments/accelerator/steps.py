"""Seconds of one step of BNA's correction on a ResNet-18, as the repair's driver runs it.

python -m experiments.accelerator.steps --out FILE [--quick]
"""

import argparse
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.accelerator import compiling
from jaxbd import files
from jaxbd.attacks import badnets
from jaxbd.base import Batch, Problem, RepairData
from jaxbd.data import draw
from jaxbd.models import build
from jaxbd.repairs import bna
from jaxbd.training import loop

CLASSES, IMAGES = 10, 1024


def task(width: int, side: int, images: int) -> tuple[Problem, Any, RepairData]:
    """A net with random weights, random images of all classes, a patch that leads to class 0."""
    shape = (side, side, 3)
    options = {"width": width}
    spec = build.Spec(arch="resnet18", classes=CLASSES, image_shape=shape, options=options)
    pixels = np.random.default_rng(0).integers(0, 256, (images, *shape), np.uint8)
    labels = (np.arange(images) % CLASSES).astype(np.int32)
    data = Batch(jnp.asarray(pixels), jnp.asarray(labels))
    attack = badnets.make(shape, CLASSES, badnets.Config())
    sources = draw.of_classes(data, tuple(range(1, CLASSES)))
    target, trigger = draw.of_classes(data, (0,)), attack.init(jax.random.key(1))
    net = build.net(spec)
    variables = net.init(jax.random.key(0))
    problem = Problem(net, shape, CLASSES, stamp=attack.stamp)
    return problem, variables, RepairData(data, sources, target, trigger)


def measure(width: int, side: int, batch: int, steps: int, rounds: int = 4) -> dict[str, Any]:
    """Seconds of a step, by rounds of `steps`; the first round, which compiles, is apart."""
    listener = compiling.Listener()
    problem, variables, rows = task(width, side, max(8 * batch, 2 * CLASSES))
    made = bna.make(problem, bna.Config(num_steps=(rounds + 1) * steps))
    state, (phase,) = made.init(jax.random.key(2), variables, rows), made.phases
    advance = loop.with_batches(phase.step, draw.uniform(batch))
    source, key, found = rows.clean_sources, jax.random.key(3), []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        state, _, _ = loop.run(advance, state, key, source, (), num_steps=steps, chunk=steps)
        found.append((time.perf_counter() - started) / steps)
    return {
        "case": {"width": width, "side": side, "batch": batch},
        "seconds_step": float(np.median(found[1:])),
        "seconds_steps": found,
        "images_per_second": batch / float(np.median(found[1:])),
        "compiling": listener.read()._asdict(),
    }


def main() -> None:
    """Writes the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    found = measure(4, 8, 4, 1, 1) if given.quick else measure(64, 32, 128, 20)
    files.write_json(given.out, found)


if __name__ == "__main__":
    main()
