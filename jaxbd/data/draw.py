"""Draws batches inside the compiled step, from a uint8 data set on the device."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd.base import ANY_SOURCE, Array, Batch, Dataset, Key
from jaxbd.caching import cached
from jaxbd.images import augment, spread_rows, to_float


@cached(32)
def uniform(batch_size: int, *, crop_padding: int = 0, flip: bool = False) -> Callable[..., Batch]:
    """Makes a draw function: (key, data, source=ANY_SOURCE) -> Batch of `batch_size` float images.

    Draws uniformly with replacement from `data`, a `Batch` of uint8 (or float) images [N, H, W, C]
    and labels [N]; given a source class, only from its images. `crop_padding` and `flip` add random
    crops and flips.
    """

    def draw(key: Key, data: Batch, source: Array | int = ANY_SOURCE) -> Batch:
        index_key, augment_key = jax.random.split(key)
        index = _indices(index_key, data.labels, jnp.asarray(source), batch_size)
        images = augment(
            augment_key, to_float(data.images[index]), crop_padding=crop_padding, flip=flip
        )
        return spread_rows(Batch(images, data.labels[index]))

    return draw


def _indices(key: Key, labels: Array, source: Array, count: int) -> Array:
    """Draws `count` rows [count] uniformly from those labelled `source` (all rows for
    ANY_SOURCE)."""
    # shapes must be static, so no boolean indexing: rank[i] counts the matching rows up to i, and
    # searchsorted finds the row at which the count first exceeds `wanted`
    rank = jnp.cumsum(jnp.where(source == ANY_SOURCE, True, labels == source))
    wanted = jnp.floor(jax.random.uniform(key, (count,)) * rank[-1]).astype(rank.dtype)
    return jnp.minimum(jnp.searchsorted(rank, wanted, side="right"), labels.shape[0] - 1)


class Batching(NamedTuple):
    """How to draw training batches: images per batch, padding for random crops [pixels], flips."""

    batch_size: int = 64
    crop_padding: int = 0
    flip: bool = False

    def draw(self) -> Callable[..., Batch]:
        """The draw function, see `uniform`."""
        return uniform(self.batch_size, crop_padding=self.crop_padding, flip=self.flip)


class Parts(NamedTuple):
    """Disjoint rows of a data set: the attacker trains on `train`, the defender has `defence`, and
    `test` is for evaluation."""

    train: Batch
    defence: Batch
    test: Batch


def divide(dataset: Dataset, train: int, defence: int, seed: int = 0) -> Parts:
    """Splits off `train` and `defence` random rows; the rest is for testing.

    The permutation depends only on `seed` and the number of rows.
    """
    order = np.random.default_rng(seed).permutation(len(dataset.labels))
    rows = np.split(order, [train, train + defence])
    return Parts(
        *(Batch(jnp.asarray(dataset.images[r]), jnp.asarray(dataset.labels[r])) for r in rows)
    )


def of_classes(data: Batch, classes: Sequence[int]) -> Batch:
    """The images of some classes, for example a trigger's sources or its target."""
    rows = np.flatnonzero(np.isin(np.asarray(data.labels), list(classes)))
    return Batch(data.images[rows], data.labels[rows])
