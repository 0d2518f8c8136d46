"""Statistics of a net's activations on a set of images: ranges, means, histograms and batch moments
per channel.

`outputs` is a function (number of the chunk, images [B, H, W, C]) -> {layer: activations
[B, …, C]}. Images are processed `CHUNK` at a time, so memory does not grow with their number.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbd.base import Array, ArrayTree, Net, Variables
from jaxbd.images import to_float
from jaxbd.repairs import histogram
from jaxbd.repairs.histogram import Grid

CHUNK = 64
"""Images pushed through the net at a time."""

Outputs = Callable[[Array, Array], dict[str, Array]]


class Range(NamedTuple):
    """Smallest and largest activation of one layer, and their standard deviation, per channel
    [C]."""

    low: Array
    high: Array
    std: Array


def ranges(outputs: Outputs, images: Array) -> dict[str, Range]:
    """`Range` of every layer over all `images` [N, H, W, C] and positions."""

    def measure(number, chunk):
        flat = {
            layer: values.reshape(-1, values.shape[-1])
            for layer, values in outputs(number, chunk).items()
        }
        return {
            # the count as [1], so that it stacks like the others
            layer: (z.min(0), z.max(0), z.mean(0), z.var(0), jnp.array([len(z)]))
            for layer, z in flat.items()
        }

    return {layer: _merge(*parts) for layer, parts in _each(measure, images).items()}


def means(outputs: Outputs, images: Array) -> dict[str, Array]:
    """Mean activation [C] of every layer over all `images` [N, H, W, C] and positions."""

    def add_up(number, chunk):
        flat = {name: z.reshape(-1, z.shape[-1]) for name, z in outputs(number, chunk).items()}
        return {name: (z.sum(0), jnp.array([len(z)], z.dtype)) for name, z in flat.items()}

    return {name: total / count for name, (total, count) in _total(add_up, images).items()}


def union(one: dict[str, Range], other: dict[str, Range]) -> dict[str, Range]:
    """Ranges that cover both arguments; standard deviations are those of `one`."""
    cover = lambda a, b: Range(jnp.minimum(a.low, b.low), jnp.maximum(a.high, b.high), a.std)
    return {layer: cover(one[layer], other[layer]) for layer in one}


def _merge(low: Array, high: Array, mean: Array, variance: Array, count: Array) -> Range:
    """The range over all chunks, from the statistics [chunks, C] and the number of values
    [chunks, 1] of each chunk."""
    # law of total variance: variance within chunks plus variance between their means
    share = (count / count.sum()).astype(mean.dtype)
    between = jnp.square(mean - (share * mean).sum(0, keepdims=True))
    return Range(low.min(0), high.max(0), jnp.sqrt((share * (variance + between)).sum(0)))


def histograms(
    outputs: Outputs, images: Array, grids: dict[str, Grid], bins: int
) -> dict[str, Array]:
    """p [C, bins] of every layer: share of the activations in each interval (Li et al. 2023, eq.
    5)."""

    def count(number, chunk):
        return {
            layer: histogram.hard(values, grids[layer], bins)
            for layer, values in outputs(number, chunk).items()
        }

    return jax.tree.map(
        lambda counted: counted / counted.sum(-1, keepdims=True), _total(count, images)
    )


def batch_moments(
    net: Net, variables: Variables, stamp: Callable[[Array, Array], Array], images: Array
) -> ArrayTree:
    """`batch_stats` with the moments of stamped images. All layers are measured in one pass, each
    BatchNorm normalising by its batch.

    # Differs from released code: takes the mean over the chunks' moments; the released code keeps
    only those of the last chunk.
    """
    moments = lambda number, chunk: moments_of_batch(net, variables, stamp(number, chunk))
    return jax.tree.map(lambda each: each.mean(0), _each(moments, images))


def moments_of_batch(net: Net, variables: Variables, images: Array) -> ArrayTree:
    """The moments of `images` [B, H, W, C] by which every BatchNorm of `net` normalises in
    training, structured as `batch_stats`; variances are unbiased, as BatchNorm stores them.

    They are computed from two updates new = m old + (1 - m) batch, one of old = 0 and one of
    old = 1.
    """
    old = variables["batch_stats"]
    update = lambda old: net.apply({**variables, "batch_stats": old}, images, train=True)[1]
    of_zero, of_one = (update(jax.tree.map(like, old)) for like in (jnp.zeros_like, jnp.ones_like))
    # m is a constant of the net, so it needs no gradient
    momentum = jax.tree.map(
        lambda zero, one: jax.lax.stop_gradient(jnp.median(one - zero)), of_zero, of_one
    )
    return jax.tree.map(lambda zero, share: zero / (1 - share), of_zero, momentum)


def _groups(images: Array) -> list[tuple[Array, Array]]:
    """(numbers [n], chunks [n, size, H, W, C]) of the full chunks, and of a shorter last chunk if
    any."""
    size = min(CHUNK, images.shape[0])
    whole = images.shape[0] // size
    chunks = images[: whole * size].reshape(whole, size, *images.shape[1:])
    groups = [(jnp.arange(whole), chunks), (jnp.array([whole]), images[None, whole * size :])]
    return [group for group in groups if group[1].shape[1]]


def _each(measure: Callable[[Array, Array], Any], images: Array) -> Any:
    """`measure(number, chunk)` for every chunk of `images` as floats, stacked [chunks, …]."""
    parts = [
        # map, not vmap: only one chunk is in memory at a time
        jax.lax.map(lambda each: measure(each[0], to_float(each[1])), group)
        for group in _groups(images)
    ]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def _total(measure: Callable[[Array, Array], Any], images: Array) -> Any:
    """Sum of `measure(number, chunk)` over the chunks of `images` as floats."""
    add = lambda total, each: (
        jax.tree.map(jnp.add, total, measure(each[0], to_float(each[1]))),
        None,
    )
    groups = _groups(images)
    shapes = jax.eval_shape(measure, jnp.asarray(0), to_float(groups[0][1][0]))
    total = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    for group in groups:
        total, _ = jax.lax.scan(add, total, group)
    return total
