"""Whether images reach a net as its training images did, by its first normalisation layer.

That layer stores the mean and variance of its inputs over the training images. Under the right
preprocessing the inputs on other images of the same kind have nearly the same moments; a wrong
scale changes the variance by its square. No labels are needed.
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
    """How far the inputs of the first normalisation layer are from those in training.

    Attributes:
      layer: the layer's path.
      shift: median over channels of |mean - stored mean| in stored standard deviations.
      spread: median over channels of the standard deviation over the stored one.
    """

    layer: str
    shift: float
    spread: float

    @property
    def distance(self) -> float:
        """0 for equal moments: the shift, plus |log| of the ratio of variances."""
        return self.shift + 2 * abs(float(np.log(max(self.spread, 1e-6))))


def first_layer(net: Net, variables: Variables, images: np.ndarray) -> str | None:
    """Path of the first layer with stored moments whose output shows its input's, None without one.

    A layer whose output is clipped by bounds does not.
    """
    found = activations.layers(net, variables, Batch(images, np.zeros(len(images), np.int32)))
    stored = variables.get("batch_stats", {})
    layer = next((name for name in found if "mean" in _at(stored, name)), None)
    if layer is None or _at(variables.get("bounds", {}), layer):
        return None
    return layer


def measure(net: Net, variables: Variables, layer: str, inputs: np.ndarray) -> Moments | None:
    """The moments of `layer`'s inputs on `inputs` [N, H, W, C]; None where they cannot be told from
    its outputs, because it scales every channel by about 0."""
    data = Batch(inputs, np.zeros(len(inputs), np.int32))
    found = evaluate.per_image(jax.random.key(0), _summary(net, layer), variables, data)
    mean, square = np.asarray(found, np.float64).mean(0)
    stored, affine = (_at(variables.get(name, {}), layer) for name in ("batch_stats", "params"))
    scale = np.asarray(affine.get("scale", np.ones_like(mean)), np.float64)
    bias = np.asarray(affine.get("bias", np.zeros_like(mean)), np.float64)
    variance = np.asarray(stored["var"], np.float64)
    # output = scale * (input - stored mean) / sqrt(stored variance + eps) + bias; dead channels
    # have next to no scale or variance
    alive = np.abs(scale) > 0.01 * np.median(np.abs(scale))
    alive &= variance > 1e-3 * np.median(variance)
    if not alive.any():
        return None
    shift = np.abs((mean - bias) / np.where(alive, scale, 1))[alive]
    spread = np.sqrt(np.maximum(square - mean**2, 0)) / np.abs(np.where(alive, scale, 1))
    return Moments(layer, float(np.median(shift)), float(np.median(spread[alive])))


@cached(32)
def _summary(net: Net, layer: str) -> Callable[[Key, Variables, Array], Array]:
    """(key, variables, images) -> [B, 2, C]: mean of the layer's output over positions, and of its
    square."""

    def summary(_: Key, variables: Variables, images: Array) -> Array:
        assert net.outputs is not None  # it showed the layer
        output = net.outputs(variables, images)[1][layer].astype(jnp.float32)
        axes = tuple(range(1, output.ndim - 1))
        return jnp.stack([output.mean(axes), jnp.square(output).mean(axes)], 1)

    return summary


def _at(tree, path: str) -> dict:
    """The entry of nested dictionaries under "a/b", an empty one where there is none."""
    for name in path.split("/"):
        tree = tree.get(name, {}) if hasattr(tree, "get") else {}
    return tree if hasattr(tree, "get") else {}
