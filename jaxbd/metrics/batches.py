"""Maps a function of a batch of images over a whole data set, with few programs and uploads.

On an accelerator the loop over batches is part of the program: up to `PORTION` batches are uploaded
at once, and only their results are downloaded. On a CPU, where arrays need no upload, the host
loops over the batches.
"""

from collections.abc import Callable, Container, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd.base import Array, ArrayTree, Batch, Key
from jaxbd.caching import cached
from jaxbd.training.program import Program, default_time

PORTION = 32
"""Maximum batches per call on an accelerator; progress is reported after each call."""


class Portion(NamedTuple):
    """n batches of B images, NumPy; the last batch of a data set is padded with copies of row 0.

    Attributes:
      numbers: [n] int32, indices of the batches in the data set.
      images: [n, B, H, W, C].
      labels: [n, B].
      real: [n, B] bool, False for padding.
    """

    numbers: np.ndarray
    images: np.ndarray
    labels: np.ndarray
    real: np.ndarray


def batches(data: Batch, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields batches (images, labels, real [B] bool) of a fixed size; where `real` is False, the
    last batch is padded with copies of row 0."""
    for portion in portions(data, batch_size, most=1):
        yield portion.images[0], portion.labels[0], portion.real[0]


def portions(
    data: Batch,
    batch_size: int,
    *,
    numbers: Container[int] | None = None,
    most: int | None = None,
) -> Iterator[Portion]:
    """Yields the data set in portions of equally many batches, so that one program serves all of
    them; the last portion may be shorter.

    Args:
      numbers: indices of the batches to take; None for all.
      most: maximum batches per portion; None for 1 on a CPU and `PORTION` elsewhere.
    """
    images, labels, total = np.asarray(data.images), np.asarray(data.labels), len(data.labels)
    chosen = [
        number for number in range(-(-total // batch_size)) if numbers is None or number in numbers
    ]
    if not chosen:
        return
    most = (1 if default_time() == "host" else PORTION) if most is None else most
    size = -(-len(chosen) // -(-len(chosen) // most))  # least size with the same number of portions
    for start in range(0, len(chosen), size):
        these = np.asarray(chosen[start : start + size], np.int32)
        index = these[:, None] * batch_size + np.arange(batch_size)
        real = index < total
        index = np.where(real, index, 0)
        yield Portion(these, images[index], labels[index], real)


Measure = Callable[[Key, ArrayTree, Array], ArrayTree]
"""(key, known, images [B, H, W, C] as stored) -> pytree of [B, …]"""


@cached(64)
def _programs(measure: Measure) -> tuple[Program, Program]:
    """Programs that apply `measure` to one batch, and to n batches in a compiled loop."""

    def one(key: Key, known: ArrayTree, number: Array, images: Array) -> ArrayTree:
        return measure(jax.random.fold_in(key, number), known, images)

    def every(key: Key, known: ArrayTree, numbers: Array, images: Array) -> ArrayTree:
        return jax.lax.map(lambda each: one(key, known, *each), (numbers, images))

    return Program(one), Program(every)


def measure_batches(
    measure: Measure,
    key: Key,
    known: ArrayTree,
    data: Batch,
    *,
    batch_size: int,
    numbers: Container[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Any:
    """Applies a pure `measure` to each image; NumPy [N, …].

    Batch i gets the key `fold_in(key, i)`.

    Args:
      known: other inputs of `measure`, for example a net's variables.
      numbers: see `portions`; N counts only the images of these batches.
      progress: called as progress(images done, all images) after each portion.
    """
    one, every = _programs(measure)
    known, found, total = jax.tree.map(jnp.asarray, known), [], len(data.labels)
    for portion in portions(data, batch_size, numbers=numbers):
        if default_time() == "host":
            rows = one(key, known, portion.numbers[0], portion.images[0])
            found.append(jax.tree.map(lambda leaf: np.asarray(leaf)[portion.real[0]], rows))  # noqa: B023
        else:
            rows = every(key, known, portion.numbers, portion.images)
            found.append(jax.tree.map(lambda leaf: np.asarray(leaf)[portion.real], rows))  # noqa: B023
        if progress is not None:
            progress(min((int(portion.numbers[-1]) + 1) * batch_size, total), total)
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *found)
