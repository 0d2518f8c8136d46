"""Layer outputs on clean and on triggered images: activations, divergences (BNA), differences
(DHBE, Fig. 7)."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd import losses
from jaxbd.base import Array, Batch, Key, Net, UserError, Variables
from jaxbd.caching import cached
from jaxbd.images import to_float
from jaxbd.metrics import evaluate
from jaxbd.repairs import activations as measured
from jaxbd.repairs import histogram
from jaxbd.training.program import Program

Stamp = Callable[[Key, Any, Array], Array]


def activations(
    net: Net,
    variables: Variables,
    data: Batch,
    *,
    layer: str,
    channel: int | None = None,
    stamp: Stamp | None = None,
    model: Any = None,
    batch_size: int = 64,
) -> np.ndarray:
    """Activations [N x positions, C] of one layer on `data`, or [N x positions] of one of its
    channels (Fig. 1).

    With a `stamp` the images carry the trigger `model`.

    Raises: UserError when the net exposes no such layer or channel.
    """
    _check_shown(net, variables, data, layer, channel or 0)
    key, show = jax.random.key(0), _shower(net, layer)
    found = evaluate.per_image(key, show, variables, data, stamp, model, batch_size=batch_size)
    found = found.reshape(-1, found.shape[-1])
    return found if channel is None else found[:, channel]


@cached(32)
def _shower(net: Net, layer: str) -> Callable[[Key, Variables, Array], Array]:
    """(key, variables, images) -> [B, …, C], one layer's activations; cached, so that it is traced
    once per layer."""
    outputs = _outputs(net)
    return lambda _, variables, images: outputs(variables, images)[1][layer]


def total_variations(
    clean: np.ndarray, triggered: np.ndarray, width: float, bins: int
) -> np.ndarray:
    """Total variation [C] between activations [N, C] and [M, C], from histograms over the range of
    the clean ones."""
    grid = histogram.grid(jnp.asarray(clean.min(0)), jnp.asarray(clean.max(0)), width, bins)
    p, q = (
        histogram.hard(jnp.asarray(values), grid, bins) / len(values)
        for values in (clean, triggered)
    )
    return np.asarray(losses.total_variation(p, q))


def _outputs(net: Net) -> Callable[..., tuple[Array, dict[str, Array]]]:
    """`net.outputs`. Raises: UserError when the net exposes no layers."""
    if net.outputs is None:
        raise UserError("the net shows no layers; give one that was not made from a bare function")
    return net.outputs


def layers(net: Net, variables: Variables, data: Batch) -> dict[str, int]:
    """{layer: number of channels} of all layers that the net exposes, in order of execution; empty
    if it exposes none."""
    found: dict[str, int] = {}
    if net.outputs is not None:
        outputs = net.outputs
        note = lambda variables, images: found.update(
            {name: values.shape[-1] for name, values in outputs(variables, images)[1].items()}
        )
        jax.eval_shape(note, variables, to_float(jnp.asarray(data.images[:1])))  # runs nothing
    return found


def _check_shown(net: Net, variables: Variables, data: Batch, layer: str, channel: int = 0) -> None:
    """Raises UserError unless the net exposes `layer` and this has the `channel`."""
    shown = layers(net, variables, data)
    if layer not in shown:
        raise UserError(f"the net shows no layer {layer!r}; it shows {', '.join(shown) or 'none'}")
    if not 0 <= channel < shown[layer]:
        raise UserError(f"layer {layer} has channels 0..{shown[layer] - 1}, not {channel}")


class Divergences(NamedTuple):
    """Mean divergences over the channels of a layer, or over all layers, each between 0 and its
    maximum."""

    tv: float
    js: float
    kl: float


def divergences(
    net: Net,
    variables: Variables,
    corrected: Variables,
    stamp: Stamp,
    model: Any,
    data: Batch,
    *,
    layer: str | None = None,
    width: float = 0.1,
    bins: int = 100,
) -> dict[str, Divergences]:
    """Divergences of triggered activations in `corrected` from clean ones in `variables`, the
    original net.

    Li et al. 2023, appendix D (Tables 9 and 10), with exact histograms over the range of the clean
    activations. For the net before correction, pass `variables` for both.

    Args:
      layer: the layer to report; default: the last exposed one, the penultimate layer of our nets.
    Returns: {layer: its mean, "all": the mean over the layers' means}.
    Raises: UserError when the net exposes no such layer.
    """
    shown = layers(net, variables, data)
    layer = (list(shown) or ["penultimate"])[-1] if layer is None else layer
    _check_shown(net, variables, data, layer)
    images = jnp.asarray(data.images)
    found = jax.device_get(_diverger(net, stamp, width, bins)(variables, corrected, model, images))
    means = {name: Divergences(*map(float, values)) for name, values in found.items()}
    every = Divergences(*(float(value) for value in np.mean(list(means.values()), axis=0)))
    return {layer: means[layer], "all": every}


@cached(32)
def _diverger(net: Net, stamp: Stamp, width: float, bins: int) -> Program:
    """(original variables, corrected variables, trigger, images) -> {layer: (TV, JS, KL)}."""

    outputs = _outputs(net)

    def diverge(variables, corrected, model, images):
        clean = lambda _, chunk: outputs(variables, chunk)[1]
        stamped = lambda number, chunk: stamp(
            jax.random.fold_in(jax.random.key(0), number), model, chunk
        )
        triggered = lambda number, chunk: outputs(corrected, stamped(number, chunk))[1]
        ranges = measured.ranges(clean, images)
        grids = {name: histogram.grid(r.low, r.high, width, bins) for name, r in ranges.items()}
        p, q = (measured.histograms(show, images, grids, bins) for show in (clean, triggered))
        forms = (losses.total_variation, losses.jensen_shannon, losses.kullback_leibler)
        return {name: tuple(form(p[name], q[name]).mean() for form in forms) for name in p}

    return Program(diverge)


class Differences(NamedTuple):
    """|a(T(x)) - a(x)| per image [N], where a is the layer's activations or the logits; >= 0, in
    their units.

    Attributes:
      layer_l1, layer_l2: L1 and L2 norm of the difference over all positions and channels.
      logits_l1, logits_l2: the same for the K logits, before softmax.
    """

    layer_l1: Array | np.ndarray
    layer_l2: Array | np.ndarray
    logits_l1: Array | np.ndarray
    logits_l2: Array | np.ndarray


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
    """Differences [N] between each image of `data` (uint8 or float) with and without the trigger;
    Yan et al. 2023, Fig. 7.

    To compare a net before and after a repair, change only `variables`: with the same images and
    key the triggers are the same. The net runs in evaluation mode.

    Args:
      stamp, model: `stamp(key, model, images)` puts the trigger on images.
      key: for triggers that are drawn or placed at random; default: key 0.
      layer: the layer to compare; default: the last exposed one, the penultimate layer of our nets.
    Raises: UserError when the net exposes no such layer.
    """
    shown = layers(net, variables, data)
    layer = (list(shown) or ["penultimate"])[-1] if layer is None else layer
    if layer not in shown:
        raise UserError(f"the net shows no layer {layer!r}; it shows {', '.join(shown) or 'none'}")
    key = jax.random.key(0) if key is None else key
    return evaluate.per_image(
        key, _differing(net, stamp, layer), (variables, model), data, batch_size=batch_size
    )


@cached(32)
def _differing(net: Net, stamp: Stamp, layer: str):
    """(key, (variables, trigger), images [B, H, W, C]) -> Differences [B]; cached, so that it is
    traced once per net."""

    outputs = _outputs(net)

    def differing(key: Key, known: tuple[Variables, Any], images: Array) -> Differences:
        variables, model = known
        clean_logits, clean = outputs(variables, images)
        stamped_logits, stamped = outputs(variables, stamp(key, model, images))
        return Differences(
            *_lengths(stamped[layer] - clean[layer]), *_lengths(stamped_logits - clean_logits)
        )

    return differing


def _lengths(change: Array) -> tuple[Array, Array]:
    """L1 and L2 norms [B] of the rows of [B, …]."""
    change = change.reshape(change.shape[0], -1)
    return jnp.abs(change).sum(1), jnp.sqrt(jnp.square(change).sum(1))


@dataclasses.dataclass(frozen=True)
class Box:
    """Summary of a sample for a box plot: median, quartiles, whiskers, and the mean.

    Attributes:
      low, high: ends of the whiskers, the outermost values within 1.5 interquartile ranges of the
        box.
      outliers: number of values beyond the whiskers.
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
    low, high, mean = float(inside.min()), float(inside.max()), float(values.mean())
    box = float(lower), float(median), float(upper)
    return Box(low, *box, high, mean, len(values) - len(inside))
