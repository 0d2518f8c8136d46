"""Folds BatchNorm into the convolution before it, for nets with fixed weights."""

from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from jaxbd.base import Variables
from jaxbd.models.norm import EPSILON

AFTER_ACTIVATION = {"bn1": "conv1", "bn2": "conv2", "shortcut_norm": "shortcut_conv"}
BEFORE_ACTIVATION = {"bn2": "conv1"}
"""For pre-activation blocks: a BatchNorm after a sum of two paths cannot be folded into either."""
CONVOLUTIONS: dict[str, Mapping[str, str]] = {
    "cnn": {f"norm{stage}": f"conv{stage}" for stage in range(8)},
    "mobilenet": AFTER_ACTIVATION,
    "preactresnet18": BEFORE_ACTIVATION,
    "resnet18": AFTER_ACTIVATION,
    "resnet34": AFTER_ACTIVATION,
    "vgg": {
        f"bn{stage}_{index}": f"conv{stage}_{index}" for stage in range(3) for index in range(2)
    },
    "wrn16-1": BEFORE_ACTIVATION,
    "wrn28-10": BEFORE_ACTIVATION,
    "wrn40-1": BEFORE_ACTIVATION,
    "wrn40-2": BEFORE_ACTIVATION,
}
"""Architecture -> name of a BatchNorm -> name of the convolution in the same module with an output
that only this BatchNorm reads."""


def frozen(arch: str, variables: Variables) -> Variables:
    """Folded variables, with which the net of `arch` in evaluation gives the same outputs as with
    `variables`, up to rounding.

    y = (w * x + b - mu) s / sqrt(var + eps) + t becomes y = (w') * x + shift: the factor goes into
    the kernel, and BatchNorm only adds the shift, from the collection `folded`. A BatchNorm without
    such a convolution does not change, and neither do the bounds of a correction. The result cannot
    be trained.
    """
    # in NumPy, because JAX would compile each operation for every shape
    flat: dict[tuple[str, ...], Any] = dict(
        flax.traverse_util.flatten_dict(jax.tree.map(np.asarray, dict(variables)))
    )
    shifts: dict[tuple[str, ...], Any] = {}
    for path in [path for path in flat if path[0] == "batch_stats" and path[-1] == "var"]:
        place, name = path[1:-2], path[-2]
        kernel = ("params", *place, CONVOLUTIONS.get(arch, {}).get(name, ""), "kernel")
        if kernel not in flat:
            continue
        own = ("params", *place, name)
        mean, variance = flat.pop(("batch_stats", *place, name, "mean")), flat.pop(path)
        factor = 1 / np.sqrt(variance + np.asarray(EPSILON, variance.dtype))
        shift = -mean * factor
        if (*own, "scale") in flat:
            scale = flat.pop((*own, "scale"))
            factor, shift = factor * scale, shift * scale + flat.pop((*own, "bias"))
        flat[kernel] = flat[kernel] * factor[None, None, None]
        bias = (*kernel[:-1], "bias")
        if bias in flat:
            shift = shift + flat.pop(bias) * factor
            # the bias moves into the shift; zeros keep the tree as the module expects it
            flat[bias] = np.zeros_like(shift)
        shifts["folded", *place, name, "shift"] = shift
    folded = flax.traverse_util.unflatten_dict({**flat, **shifts})
    return {"batch_stats": {}, **jax.tree.map(jnp.asarray, folded)}
