"""Re-estimates BatchNorm's running moments, for weights that training did not produce."""

import jax
import jax.numpy as jnp

from jaxbd.base import Array, ArrayTree, Net, Variables
from jaxbd.images import to_float

CHUNK = 128
"""Default batch size."""


def restate(net: Net, variables: Variables, images: Array, chunk: int = CHUNK) -> ArrayTree:
    """`batch_stats` of `net` for these params: the mean over batches of each batch's moments.

    Works for any net that updates its moments as new = m old + (1 - m) batch, with any m per layer:
    updates of two old values determine m and the batch's moment. Moments that do not move (m = 1,
    or a net that never updates) stay unchanged.

    Args:
      images: [N, H, W, C]; chunk: images per batch. A last batch that is not full is left out.
    """
    stats = variables.get("batch_stats", {})
    if not jax.tree.leaves(stats):
        return stats
    size = min(chunk, len(images))
    whole = len(images) // size
    chunks = images[: whole * size].reshape(whole, size, *images.shape[1:])

    def of_chunk(some: Array) -> tuple[ArrayTree, ArrayTree, ArrayTree]:
        update = lambda old: net.apply(
            {**variables, "batch_stats": old}, to_float(some), train=True
        )[1]
        first = update(jax.tree.map(jnp.zeros_like, stats))
        # on the scale of the moments, so that rounding errors do not swamp m; both updates are in
        # one compiled program, which computes all but the moments only once
        old = jax.tree.map(lambda leaf: jnp.abs(leaf) + 1, first)
        return first, old, update(old)

    return jax.tree.map(_solve, stats, *jax.lax.map(of_chunk, chunks))


def _solve(stored: Array, first: Array, old: Array, second: Array) -> Array:
    """Solves for the batch moments x [n, …] and returns their mean over batches, given `first` =
    (1 - m) x and `second` = m old + (1 - m) x; returns `stored` where m is 1."""
    if not jnp.issubdtype(stored.dtype, jnp.floating):
        return stored
    moves = 1 - (second - first) / old
    is_still = moves < 1e-4
    found = (first / jnp.where(is_still, 1, moves)).mean(0)
    return jnp.where(is_still.all(0), stored, found).astype(stored.dtype)
