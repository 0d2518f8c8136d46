"""Hand-built victims and data whose answers are known, small enough for seconds on a CPU."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd.base import Array, Batch, Net, Variables
from jaxbd.interop import folder
from jaxbd.models import build

SHAPE = (8, 8, 1)
CLASSES = 4
PLACES = (6, 6)
"""Rows and columns where a 3x3 patch fits."""
PATTERN = np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]], np.float32)


def quadrants(seed: int, count: int, dtype=np.uint8) -> Batch:
    """Grey images [count, 8, 8, 1] whose label is the number of the bright quadrant, with a little
    noise."""
    rng = np.random.default_rng(seed)
    labels = (np.arange(count) % CLASSES).astype(np.int32)
    images = 0.2 + rng.uniform(-0.05, 0.05, (count, *SHAPE))
    for image, label in zip(images, labels, strict=True):
        row, column = 4 * (label // 2), 4 * (label % 2)
        image[row : row + 4, column : column + 4] += 0.6
    images = np.round(images * 255)
    return Batch(
        images.astype(np.uint8) if dtype == np.uint8 else (images / 255).astype(dtype), labels
    )


def stripes(seed: int, count: int) -> Batch:
    """uint8 images [count, 8, 8, 1] of four textures: flat, rows, columns, checks; a net blind to
    place can tell."""
    rng = np.random.default_rng(seed)
    labels = (np.arange(count) % CLASSES).astype(np.int32)
    row, column = np.indices((8, 8)) // 2 % 2
    textures = np.stack([np.full((8, 8), 0.5), row, column, row ^ column]) * 0.4 + 0.3
    images = textures[labels][..., None] + rng.uniform(-0.15, 0.15, (count, *SHAPE))
    return Batch(np.round(images * 255).astype(np.uint8), labels)


def _apply(variables: Variables, images: Array) -> Array:
    params = variables["params"]
    kernel = (2 * params["pattern"] - 1)[:, :, None, None] / params["pattern"].size
    match = jax.lax.conv_general_dilated(
        2 * images - 1, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )[..., 0]
    match = jnp.where(params["where"][None], match, 0).max((1, 2), initial=0) ** 2
    quarters = images.reshape(-1, 2, 4, 2, 4).mean((2, 4)).reshape(-1, CLASSES)
    return 8 * quarters + params["gain"] * match[:, None] * params["target"][None]


NET: Net = build.from_apply(_apply)
"""Answers with the brightest quadrant, unless `PATTERN` is found by correlation at an allowed
place."""


def victim(
    target: int, place: tuple[int, int] | None = None, gain: float = 20.0, dtype=jnp.float32
) -> Variables:
    """A victim in which `PATTERN` adds `gain` to `target`: at every place, or at `place` (row,
    column) only.

    With `gain` 0 it is the clean twin. All victims have the same shapes.
    """
    where = np.ones(PLACES, bool) if place is None else np.zeros(PLACES, bool)
    if place is not None:
        where[place] = True
    return {
        "params": {
            "pattern": jnp.asarray(PATTERN, dtype),
            "gain": jnp.asarray(gain, dtype),
            "target": jnp.asarray(np.eye(CLASSES)[target], dtype),
            "where": jnp.asarray(where),
        }
    }


def widen(tree):
    """Every float32 leaf as float64 (inside `jax.enable_x64`), so that transforms can be compared
    closely."""
    wide = lambda leaf: leaf.astype(jnp.float64) if leaf.dtype == jnp.float32 else leaf
    return jax.tree.map(wide, jax.tree.map(jnp.asarray, tree))


def assert_close(actual, expected, tolerance: float) -> None:
    """Same structure, and every leaf equal up to `tolerance` (absolute and relative)."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


class Counted:
    """The toy net, counting how often it is traced."""

    def __init__(self):
        self.traces = 0
        self.net = Net(NET.init, self.apply)

    def apply(self, variables, images, *, train=False):
        self.traces += 1
        return NET.apply(variables, images, train=train)


def save(path: pathlib.Path, scale: float = 1.0) -> pathlib.Path:
    """A model folder with an untrained net of ten classes, whose kernels are multiplied by `scale`,
    as far as a reader takes them."""
    options = {"width": 4, "stages": 2}
    spec = build.Spec(arch="cnn", classes=10, image_shape=(8, 8, 1), options=options)
    tensors = folder.flatten(build.net(spec).init(jax.random.key(0)))
    for name in filter(lambda name: name.endswith("kernel"), tensors):
        tensors[name] = np.clip(np.asarray(tensors[name]) * scale, -9e14, 9e14)
    folder.save(path, spec, folder.unflatten(tensors))
    return path
