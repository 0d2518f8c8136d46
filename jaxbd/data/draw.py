"""Batches drawn inside the compiled step from a data set that lies on the device as uint8."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxbd.base import ANY_SOURCE, Array, Batch, Key
from jaxbd.images import augment, divided, to_float
from jaxbd.remembered import remembered


@remembered(32)
def uniform(batch_size: int, *, crop_padding: int = 0, flip: bool = False) -> Callable[..., Batch]:
    """A draw function: (key, data, source=ANY_SOURCE) -> Batch of `batch_size` float images, with replacement.

    `data` is a `Batch` of uint8 (or float) images [N, H, W, C] and labels [N]. With a source class only its images are
    drawn. Random crops and flips are applied when asked for.
    """

    def draw(key: Key, data: Batch, source: Array | int = ANY_SOURCE) -> Batch:
        index_key, augment_key = jax.random.split(key)
        index = _indices(index_key, data.labels, jnp.asarray(source), batch_size)
        images = augment(augment_key, to_float(data.images[index]), crop_padding=crop_padding, flip=flip)
        return divided(Batch(images, data.labels[index]))

    return draw


def _indices(key: Key, labels: Array, source: Array, count: int) -> Array:
    """`count` uniform rows [count] among those whose label is `source` (all rows for ANY_SOURCE)."""
    rank = jnp.cumsum(jnp.where(source == ANY_SOURCE, True, labels == source))
    wanted = jnp.floor(jax.random.uniform(key, (count,)) * rank[-1]).astype(rank.dtype)
    return jnp.minimum(jnp.searchsorted(rank, wanted, side="right"), labels.shape[0] - 1)
