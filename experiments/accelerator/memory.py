"""A search that may take too little memory, and one for which the device has too little.

python -m experiments.accelerator.memory --out FILE [--quick]

Three runs of the same cells: all at once; with a budget halfway between one cell and all; and with
a budget that no device has, so that the device itself runs out and the slots are halved. The last
is left out on a CPU, where it would take the machine's memory. Results must be equal up to
rounding.
"""

import argparse
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd import files
from jaxbd.base import Batch, UserError
from jaxbd.data import draw
from jaxbd.inversion import neural_cleanse
from jaxbd.models import build
from jaxbd.training import memory, sweep
from jaxbd.training.run import Run

CLASSES = 10


def task(width: int, side: int, batch: int, pairs: int) -> tuple[Any, ...]:
    """Arguments of `sweep.search`: Neural Cleanse for the first `pairs` of all pairs of classes."""
    shape = (side, side, 3)
    spec = build.Spec(arch="resnet18", classes=CLASSES, image_shape=shape, options={"width": width})
    net = build.net(spec)
    pixels = np.random.default_rng(0).integers(0, 256, (20 * CLASSES, *shape), np.uint8)
    labels = (np.arange(len(pixels)) % CLASSES).astype(np.int32)
    cells = sweep.grid(range(CLASSES), source=range(CLASSES))
    cells = jax.tree.map(lambda leaf: leaf[:pairs], cells)
    inversion = neural_cleanse.make(net, shape, neural_cleanse.for_pairs())
    variables = net.init(jax.random.key(0))
    frozen = variables if net.frozen is None else net.frozen(variables)
    data = Batch(jnp.asarray(pixels), jnp.asarray(labels))
    return jax.random.key(1), inversion, draw.uniform(batch), data, cells, frozen


class Watched:
    """A run that remembers what it was told in words."""

    def __init__(self):
        self.notices: list[str] = []
        self.run = Run(notice=self.notices.append)


def search(parts: tuple[Any, ...], **settings: Any) -> dict[str, Any]:
    """Slots, notices and masks of a search; the error's line where it ended in one."""
    watched = Watched()
    try:
        found = sweep.search(watched.run, "memory", *parts, num_steps=2, chunk=2, **settings)
    except UserError as error:
        return {"error": str(error), "notices": watched.notices}
    return {
        "slots": found.slots,
        "notices": watched.notices,
        "norms": np.asarray(found.states.best_norm, float).tolist(),
        "losses": np.asarray(found.infos.loss, float).tolist(),
    }


def compare(sizes: tuple[int, int, int], pairs: int, wide: tuple[int, int, int]) -> dict[str, Any]:
    """All runs; `wide` are the sizes of the one that the device cannot hold."""
    parts = task(*sizes, pairs)
    whole = search(parts, slots=pairs)
    needed, least = (
        memory.needed(sweep.compile_step(*task(*sizes, count))) for count in (pairs, 1)
    )
    # not half of `needed`: at toy size the weights, which every cell needs, are most of it
    budget = (needed + least) // 2
    found: dict[str, Any] = {
        "needed": needed,
        "available": memory.available(),
        "all at once": whole,
        "budget": budget,
        "some of the memory": search(parts, slots=pairs, memory_budget=budget),
        "a byte": search(parts, slots=pairs, memory_budget=1),
    }
    if jax.default_backend() == "cpu":
        return {**found, "out of memory": "left out on a CPU"}
    return {**found, "out of memory": search(task(*wide, pairs), slots=pairs)}


def is_sound(found: dict[str, Any]) -> bool:
    """Whether fewer slots gave the same losses, and no slot at all was said in one line."""
    some, whole = found["some of the memory"], found["all at once"]
    if "losses" not in some or "error" not in found["a byte"]:
        return False
    halved = isinstance(found["out of memory"], str) or bool(found["out of memory"].get("notices"))
    close = np.allclose(some["losses"], whole["losses"], rtol=1e-3, atol=1e-5)
    return bool(close and some["slots"] < whole["slots"] and halved)


def main() -> int:
    """Writes the record; 1 where something is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    sizes = (4, 8, 4) if given.quick else (64, 32, 16)
    # the wide search takes about 20 GB; the queue leaves this process a tenth of the device
    found = compare(sizes, 4 if given.quick else 16, (64, 32, 128))
    files.write_json(given.out, {**found, "sound": is_sound(found)})
    return int(not is_sound(found))


if __name__ == "__main__":
    raise SystemExit(main())
