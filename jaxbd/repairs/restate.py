"""BatchNorm's running moments measured anew, for weights that were not trained where they are."""

import jax
import jax.numpy as jnp

from jaxbd.base import Array, ArrayTree, Net, Variables
from jaxbd.images import to_float

CHUNK = 128
"""Images of a batch whose moments are averaged."""


def restate(net: Net, variables: Variables, images: Array, chunk: int = CHUNK) -> ArrayTree:
    """`batch_stats` of `net` with these params: the mean over batches of each batch's moments.

    Any net that updates its moments as new = m old + (1 - m) batch will do, whatever the m of each
    layer: the updates of two old values give m and the batch's moment. What does not move
    (m = 1, or a net that never updates) stays as it is.

    Args:
      images: [N, H, W, C]; chunk: images of a batch. What is over of whole batches is left out.
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
        # as large as the moments themselves, so that rounding does not drown m; all but the moments
        # is computed once for both updates, since they are parts of one compiled program
        old = jax.tree.map(lambda leaf: jnp.abs(leaf) + 1, first)
        return first, old, update(old)

    return jax.tree.map(_solve, stats, *jax.lax.map(of_chunk, chunks))


def _solve(stored: Array, first: Array, old: Array, second: Array) -> Array:
    """The mean over batches [n, …] of x, where `first` is (1 - m) x and `second` m old + (1 - m) x;
    `stored` where m is 1."""
    if not jnp.issubdtype(stored.dtype, jnp.floating):
        return stored
    moves = 1 - (second - first) / old
    is_still = moves < 1e-4
    found = (first / jnp.where(is_still, 1, moves)).mean(0)
    return jnp.where(is_still.all(0), stored, found).astype(stored.dtype)
