"""Checks, at a net's first normalisation layer, whether images are preprocessed as in training.

That layer stores the mean and variance of its inputs over the training images. Under the right
preprocessing, its inputs on similar images have nearly the same moments; a wrong scale multiplies
the variance by its square. No labels are needed.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd.base import Array, Batch, Key, Net, Variables
from jaxbd.caching import cached
from jaxbd.metrics import activations, evaluate


class Moments(NamedTuple):
    """How much the inputs of the first normalisation layer differ from those in training.

    Attributes:
      layer: the layer's path.
      shift: median over channels of |mean - stored mean| / stored standard deviation.
      spread: median over channels of standard deviation / stored standard deviation.
    """

    layer: str
    shift: float
    spread: float

    @property
    def distance(self) -> float:
        """shift + |log(ratio of variances)|; 0 for equal moments."""
        return self.shift + 2 * abs(float(np.log(max(self.spread, 1e-6))))


def first_layer(net: Net, variables: Variables, images: np.ndarray) -> str | None:
    """Path of the first layer with stored moments, or None.

    Also None if that layer's output is clipped by bounds: the input's moments cannot be recovered
    from it.
    """
    found = activations.layers(net, variables, Batch(images, np.zeros(len(images), np.int32)))
    stored = variables.get("batch_stats", {})
    layer = next((name for name in found if "mean" in _at(stored, name)), None)
    if layer is None or _at(variables.get("bounds", {}), layer):
        return None
    return layer


def measure(net: Net, variables: Variables, layer: str, inputs: np.ndarray) -> Moments | None:
    """Moments of `layer`'s inputs when the net is fed `inputs` [N, H, W, C].

    They are computed from the layer's outputs. None if that is impossible because the layer scales
    every channel by about 0.
    """
    data = Batch(inputs, np.zeros(len(inputs), np.int32))
    found = evaluate.per_image(jax.random.key(0), _summary(net, layer), variables, data)
    mean, square = np.asarray(found, np.float64).mean(0)
    stored, affine = (_at(variables.get(name, {}), layer) for name in ("batch_stats", "params"))
    scale = np.asarray(affine.get("scale", np.ones_like(mean)), np.float64)
    bias = np.asarray(affine.get("bias", np.zeros_like(mean)), np.float64)
    variance = np.asarray(stored["var"], np.float64)
    # output = scale * (input - stored mean) / sqrt(stored variance + eps) + bias is inverted for
    # scale and bias; leave out dead channels, which have next to no scale or variance
    alive = np.abs(scale) > 0.01 * np.median(np.abs(scale))
    alive &= variance > 1e-3 * np.median(variance)
    if not alive.any():
        return None
    shift = np.abs((mean - bias) / np.where(alive, scale, 1))[alive]
    spread = np.sqrt(np.maximum(square - mean**2, 0)) / np.abs(np.where(alive, scale, 1))
    return Moments(layer, float(np.median(shift)), float(np.median(spread[alive])))


@cached(32)
def _summary(net: Net, layer: str) -> Callable[[Key, Variables, Array], Array]:
    """(key, variables, images) -> [B, 2, C]: mean over positions of the layer's output and of its
    square."""

    def summary(_: Key, variables: Variables, images: Array) -> Array:
        assert net.outputs is not None  # `first_layer` found the layer through it
        output = net.outputs(variables, images)[1][layer].astype(jnp.float32)
        axes = tuple(range(1, output.ndim - 1))
        return jnp.stack([output.mean(axes), jnp.square(output).mean(axes)], 1)

    return summary


def _at(tree, path: str) -> dict:
    """The dictionary at path "a/b" in nested dictionaries; empty if there is none."""
    for name in path.split("/"):
        tree = tree.get(name, {}) if hasattr(tree, "get") else {}
    return tree if hasattr(tree, "get") else {}
