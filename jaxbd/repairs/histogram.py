"""Histograms of activations per channel, exact and differentiable, on BNA's intervals (Li et al.
2023, section 4.2).

The soft indicator of eq. (6), sigmoid(tau (z - b_{i-1})) - sigmoid(tau (z - b_i)), is flat in
floating point except near the two edges of its interval. Each value is therefore added only to the
few intervals around its own: time and memory do not depend on the number of intervals, and an array
[images x positions x channels x intervals] is never made.

A scan over the edges would read the activations once per edge. The scatter-adds used here need only
a few passes, spread over channels x intervals addresses.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxbd.base import Array

SATURATED = 15.0
"""The sigmoid counts as 1 from this argument on, where it is 1 - 3e-7."""


class Grid(NamedTuple):
    """The intervals of C channels: (-inf, b_1), [b_1, b_2), …, [b_{M-1}, inf) with b_i = low + i
    width.

    Attributes:
      low: b_0 [C], where the first interval would begin if it were not half-infinite.
      width: [C] > 0.
      intervals: M [C] int32 >= 1; a histogram's entries from index M on are zero.
    """

    low: Array
    width: Array
    intervals: Array


def grid(low: Array, high: Array, width: float, bins: int) -> Grid:
    """Intervals that cover [low, high] [C]: M = ceil(range / width), at least 1.

    # Differs from paper: a channel that needs more than `bins` intervals gets `bins` wider ones.
    """
    wide = jnp.maximum((high - low) / bins, width).astype(low.dtype)
    # the factor, so that a rounding error does not add an interval
    count = jnp.ceil((high - low) / wide * (1 - 1e-6)).astype(jnp.int32)
    return Grid(low, wide, jnp.clip(count, 1, bins))


def reach(tau: float, width: float) -> int:
    """Number of edges on either side of a value at which the sigmoid may differ from 0 and 1, for
    intervals at least `width` wide."""
    return max(1, math.ceil(SATURATED / (tau * width) - 1e-9))


def hard(values: Array, grid: Grid, bins: int) -> Array:
    """Counts [C, bins] int32 of `values` [..., C] in each interval: the indicator of eq. (5),
    without its 1 / N."""
    return _sums(jnp.ones(values.shape, jnp.int32), _index(values, grid), bins)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def soft(values: Array, grid: Grid, bins: int, tau: float, reach: int = 1) -> Array:
    """Probabilities [C, bins] of `values` [..., C] by the soft indicator, differentiable in
    `values` (eq. 5 and 6).

    The forward pass needs at most 6 times the memory of `values`, for any number of bins; for the
    backward pass it saves only `values` and the grid.

    Args:
      bins: at least the largest `grid.intervals`.
      tau: the scale factor; `reach`: from the function of that name, for `tau` and the smallest
        width.
    """
    index = _index(values, grid)
    upper = _edge(values, grid, index, -reach, tau, reach)
    total = jnp.zeros((values.shape[-1], bins), values.dtype)
    for offset in range(-reach, reach + 1):
        lower, upper = upper, _edge(values, grid, index, offset + 1, tau, reach)
        total += _shift(_sums(lower - upper, index, bins), offset)
    return total / (values.size // values.shape[-1])


def _soft_forward(values, grid, bins, tau, reach):
    return soft(values, grid, bins, tau, reach), (values, grid)


def _soft_backward(bins, tau, reach, saved, cotangent):
    """Gradient: d/dz sigmoid(tau (z - b_i)), which interval i + 1 gains and interval i loses, times
    the cotangents; summed over the edges in reach."""
    values, grid = saved
    index = _index(values, grid)
    gain = jnp.pad(cotangent[:, 1:] - cotangent[:, :-1], ((0, 0), (1, 1))).reshape(-1)
    channel = _along_last(jnp.arange(values.shape[-1], dtype=jnp.int32) * (bins + 1), values.ndim)
    slope = jnp.zeros_like(values)
    for offset in range(1 - reach, reach + 1):
        level = _edge(values, grid, index, offset, tau, reach)
        slope += level * (1 - level) * gain[channel + jnp.clip(index + offset, 0, bins)]
    return slope * (tau / (values.size // values.shape[-1])), None


soft.defvjp(_soft_forward, _soft_backward)


def _index(values: Array, grid: Grid) -> Array:
    """Index [..., C] int32 of the interval that contains each value."""
    low, width, last = (
        _along_last(leaf, values.ndim) for leaf in (grid.low, grid.width, grid.intervals - 1)
    )
    return jnp.clip(jnp.floor((values - low) / width), 0, last.astype(values.dtype)).astype(
        jnp.int32
    )


def _edge(values: Array, grid: Grid, index: Array, offset: int, tau: float, reach: int) -> Array:
    """sigmoid(tau (z - b_i)) [..., C] for edge i = index + offset; 1 at and below b_0, 0 at and
    above b_M.

    Edges out of reach count as 1 below the value and 0 above it.
    """
    if not -reach < offset <= reach:
        return jnp.full_like(values, offset <= -reach)
    low, width, count = (_along_last(leaf, values.ndim) for leaf in grid)
    edge = index + offset
    level = jax.nn.sigmoid(tau * (values - (low + edge.astype(values.dtype) * width)))
    return jnp.where(edge <= 0, 1, jnp.where(edge >= count, 0, level)).astype(values.dtype)


def _sums(amounts: Array, index: Array, bins: int) -> Array:
    """Sums `amounts` [..., C] by `index` [..., C] within each channel: [C, bins]."""
    channels = amounts.shape[-1]
    place = index + _along_last(jnp.arange(channels, dtype=jnp.int32) * bins, index.ndim)
    return (
        jnp.zeros(channels * bins, amounts.dtype)
        .at[place.reshape(-1)]
        .add(amounts.reshape(-1))
        .reshape(-1, bins)
    )


def _shift(sums: Array, offset: int) -> Array:
    """Moves `sums` [C, bins] up by `offset` bins. The values that drop out are 0, because beyond
    either end both edges have the same sigmoid."""
    bins = sums.shape[1]
    padded = jnp.pad(sums, ((0, 0), (max(offset, 0), max(-offset, 0))))
    return jax.lax.slice_in_dim(padded, max(-offset, 0), max(-offset, 0) + bins, axis=1)


def _along_last(leaf: Array, ndim: int) -> Array:
    """Reshapes [C] to [1, …, 1, C]."""
    return leaf.reshape((1,) * (ndim - 1) + (-1,))
