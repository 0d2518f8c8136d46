"""Batches drawn inside the compiled step from a data set that lies on the device as uint8."""

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
    """A draw function: (key, data, source=ANY_SOURCE) -> Batch of `batch_size` float images, with
    replacement.

    `data` is a `Batch` of uint8 (or float) images [N, H, W, C] and labels [N]. With a source class
    only its images are drawn. Random crops and flips are applied when asked for.
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
    """`count` uniform rows [count] among those whose label is `source` (all rows for
    ANY_SOURCE)."""
    rank = jnp.cumsum(jnp.where(source == ANY_SOURCE, True, labels == source))
    wanted = jnp.floor(jax.random.uniform(key, (count,)) * rank[-1]).astype(rank.dtype)
    return jnp.minimum(jnp.searchsorted(rank, wanted, side="right"), labels.shape[0] - 1)


class Batching(NamedTuple):
    """How training batches are drawn: images a batch, pixels of padding for random crops, flips."""

    batch_size: int = 64
    crop_padding: int = 0
    flip: bool = False

    def draw(self) -> Callable[..., Batch]:
        """The draw function, see `uniform`."""
        return uniform(self.batch_size, crop_padding=self.crop_padding, flip=self.flip)


class Parts(NamedTuple):
    """Disjoint rows of a data set: the attacker trains on `train`, the defender holds `defence`,
    `test` judges."""

    train: Batch
    defence: Batch
    test: Batch


def divide(dataset: Dataset, train: int, defence: int, seed: int = 0) -> Parts:
    """`train` and `defence` random rows; the rest is for testing. The permutation depends on `seed`
    alone."""
    order = np.random.default_rng(seed).permutation(len(dataset.labels))
    rows = np.split(order, [train, train + defence])
    return Parts(
        *(Batch(jnp.asarray(dataset.images[r]), jnp.asarray(dataset.labels[r])) for r in rows)
    )


def of_classes(data: Batch, classes: Sequence[int]) -> Batch:
    """The images of some classes, such as a trigger's sources or its target."""
    rows = np.flatnonzero(np.isin(np.asarray(data.labels), list(classes)))
    return Batch(data.images[rows], data.labels[rows])
