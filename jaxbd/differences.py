"""How much a trigger still moves a net's activations: DHBE's measure of what an erasure left (Fig. 7). Composition."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd import correct, evaluate
from jaxbd.base import Array, Batch, Key, Net, UserError, Variables
from jaxbd.correct import Stamp
from jaxbd.remembered import remembered


class Differences(NamedTuple):
    """|a(T(x)) - a(x)| per image [N], a the layer's activations or the logits; in their own units, from 0.

    Attributes:
      layer_l1, layer_l2: sum of absolute differences over all places and channels of the layer, and Euclidean length.
      logits_l1, logits_l2: the same of the K logits, before softmax.
    """

    layer_l1: np.ndarray
    layer_l2: np.ndarray
    logits_l1: np.ndarray
    logits_l2: np.ndarray


def activation_differences(
    net: Net,
    variables: Variables,
    data: Batch,
    stamp: Stamp,
    model: Any,
    *,
    key: Key | None = None,
    layer: str | None = None,
    batch_size: int = 256,
) -> Differences:
    """Differences [N] of each image of `data` (uint8 or float) with and without the trigger; Yan et al. 2023, Fig. 7.

    Nets before and after a repair compare where `variables` is all that changes: the images, the key and with it the
    triggers are the same. The net runs in evaluation.

    Args:
      stamp, model: `stamp(key, model, images)` puts the trigger on images.
      key: of triggers that are drawn or placed at random; key 0 by default.
      layer: the one that counts; the last one shown, the penultimate of our nets, when not given.
    Raises: UserError when the net shows no such layer.
    """
    shown = correct.layers(net, variables, data)
    layer = (list(shown) or ["penultimate"])[-1] if layer is None else layer
    if layer not in shown:
        raise UserError(f"the net shows no layer {layer!r}; it shows {', '.join(shown) or 'none'}")
    key = jax.random.key(0) if key is None else key
    return evaluate.per_image(key, _differing(net, stamp, layer), (variables, model), data, batch_size=batch_size)


@remembered(32)
def _differing(net: Net, stamp: Stamp, layer: str):
    """(key, (variables, trigger), images [B, H, W, C]) -> Differences [B]; the same function for the same net."""

    def differing(key: Key, known: tuple[Variables, Any], images: Array) -> Differences:
        variables, model = known
        clean_logits, clean = net.outputs(variables, images)
        stamped_logits, stamped = net.outputs(variables, stamp(key, model, images))
        return Differences(*_lengths(stamped[layer] - clean[layer]), *_lengths(stamped_logits - clean_logits))

    return differing


def _lengths(change: Array) -> tuple[Array, Array]:
    """L1 and L2 norms [B] of the rows of [B, …]."""
    change = change.reshape(change.shape[0], -1)
    return jnp.abs(change).sum(1), jnp.sqrt(jnp.square(change).sum(1))


@dataclasses.dataclass(frozen=True)
class Box:
    """What a box plot draws of a sample: median, quartiles, whiskers, and the mean beside them.

    Attributes:
      low, high: the outermost values within 1.5 interquartile ranges of the box; what lies beyond is an outlier.
      outliers: how many values do.
    """

    low: float
    lower_quartile: float
    median: float
    upper_quartile: float
    high: float
    mean: float
    outliers: int


def boxes(differences: Differences) -> dict[str, Box]:
    """The box of each measure: `layer_l1`, `layer_l2`, `logits_l1`, `logits_l2`."""
    return {name: _box(values) for name, values in differences._asdict().items()}


def _box(values: np.ndarray) -> Box:
    lower, median, upper = np.percentile(values, (25, 50, 75))
    reach = 1.5 * (upper - lower)
    inside = values[(values >= lower - reach) & (values <= upper + reach)]
    numbers = inside.min(), lower, median, upper, inside.max(), values.mean()
    return Box(*map(float, numbers), len(values) - len(inside))
