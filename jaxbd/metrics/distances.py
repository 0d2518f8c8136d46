"""Distances between classes, and the distance by which a trigger moves an image; Yan et al. 2023,
section 4.3.1.

A backdoor differs from a class by its size: a trigger changes an image far less than the distance
between two classes (eq. 3). Both are Earth-Mover distances (eq. 4). Between classes it is measured
over random projections (Table 2). For a trigger it is the sum of all pixel changes; for the
families of Table 1, closed forms are derived here for pixels that are uniform on [0, 1].
Composition.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd.base import Array, Batch, Key, UserError
from jaxbd.caching import cached
from jaxbd.images import to_float
from jaxbd.metrics import evaluate
from jaxbd.metrics.activations import Stamp
from jaxbd.training.program import Program

# ---- between classes ----------------------------------------------------------------------------


def sliced_wasserstein(
    key: Key, one: Array, other: Array, *, projections: int = 128, order: float = 1
) -> Array:
    """Sliced-Wasserstein distance [] between two samples [N, D] and [M, D], pixels in [0, 1];
    Kolouri et al. 2019, eq. (6).

    SW_p = (mean over unit directions r of W_p(r x, r y)^p)^(1/p), with directions uniform on the
    sphere. In one dimension W_p^p = integral over u in [0, 1] of |F^-1(u) - G^-1(u)|^p. This is
    exact for samples of any sizes: both quantile functions are step functions, with jumps at i/N
    and at j/M. The result is between 0 and the largest Euclidean distance between two images.

    Args:
      order: p >= 1; 1 is the Earth-Mover distance of eq. (4).
    Raises: UserError for an order below 1, no projections, or an empty sample.
    """
    _check(projections, order)
    if not len(one) or not len(other):
        raise UserError("sliced_wasserstein: a sample is empty; give at least one image in each")
    along = directions(key, projections, one.shape[1])
    longest = max(len(one), len(other))
    first, second = (_sort_columns(_project(sample, along), longest) for sample in (one, other))
    return _step_distance(first, second, len(one), len(other), order).mean() ** (1 / order)


def directions(key: Key, projections: int, dimensions: int) -> Array:
    """Draws unit vectors [projections, dimensions], uniform on the sphere."""
    drawn = jax.random.normal(key, (projections, dimensions))
    return drawn / jnp.linalg.norm(drawn, axis=1, keepdims=True)


def class_distances(
    key: Key,
    data: Batch,
    classes: int,
    *,
    projections: int = 512,
    order: float = 1,
    block: int = 128,
    batch_size: int = 1024,
) -> np.ndarray:
    """Sliced-Wasserstein distances [K, K] between the images of all pairs of classes; symmetric, 0
    on the diagonal. Table 2.

    All pairs share the directions. Classes may differ in size, see `sliced_wasserstein`. One
    compiled program projects `batch_size` images on `block` directions, another loops over the
    pairs. Memory holds the given images, `block` floats for each of K times the largest class, and
    the values of the current pair.

    The unit is that of pixels in [0, 1] along a unit direction. The paper does not give the length
    of its directions, so only the order of its figures can be compared; `as_pixel_changes` makes
    these distances comparable with a trigger's.

    Raises: UserError for an order below 1, no projections, or a class without images.
    """
    _check(projections, order)
    labels, images = np.asarray(data.labels), np.asarray(data.images)
    rows = [np.flatnonzero(labels == k) for k in range(classes)]
    empty = [k for k, own in enumerate(rows) if not len(own)]
    if empty:
        raise UserError(
            f"class_distances: class {empty[0]} has no images; give some of each of the {classes}"
            " classes"
        )
    counts = np.array([len(own) for own in rows], np.int32)
    pairs = np.stack(np.triu_indices(classes, 1), axis=1).astype(np.int32)
    totals = np.zeros(len(pairs))
    for start in range(0, projections, block):
        along = directions(
            jax.random.fold_in(key, start), min(block, projections - start), images[0].size
        )
        values = _projected(images, along, batch_size)
        table = np.full((classes, counts.max(), along.shape[0]), np.inf, np.float32)
        for k, own in enumerate(rows):
            table[k, : len(own)] = values[own]
        totals += np.asarray(_pairwise(order)(table, counts, pairs), np.float64)
    found = np.zeros((classes, classes))
    found[pairs[:, 0], pairs[:, 1]] = found[pairs[:, 1], pairs[:, 0]] = (totals / projections) ** (
        1 / order
    )
    return found


class Closest(NamedTuple):
    """A row of Table 2: the two nearest classes, their distance, and the mean over all pairs."""

    one: int
    other: int
    distance: float
    mean: float


def closest(distances: np.ndarray) -> Closest:
    """The row of Table 2 for `distances` [K, K], K >= 2."""
    rows, columns = np.triu_indices(len(distances), 1)
    values = distances[rows, columns]
    best = int(values.argmin())
    return Closest(int(rows[best]), int(columns[best]), float(values[best]), float(values.mean()))


def as_pixel_changes(distance: float, dimensions: int) -> float:
    """Converts a sliced distance of order 1 to a sum of pixel changes: c D for the shift of all D
    pixels by c that has this distance.

    Such a shift has length c sqrt(D) and sliced distance c sqrt(D) E|r_1|, where E|r_1| = G(D/2) /
    (sqrt(pi) G((D+1)/2)), about sqrt(2 / (pi D)). Of all shifts of this length it changes the
    pixels most, so the result is generous.
    """
    mean_part = math.exp(
        math.lgamma(dimensions / 2) - math.lgamma((dimensions + 1) / 2)
    ) / math.sqrt(math.pi)
    return distance * math.sqrt(dimensions) / mean_part


def _check(projections: int, order: float) -> None:
    if projections < 1 or order < 1:
        raise UserError(
            f"sliced distance: {projections} projections of order {order}; give at least 1 of each"
        )


def _project(images: Array, along: Array) -> Array:
    """Projects images [N, …] (uint8 or float) on directions [P, D] -> [N, P]."""
    flat = to_float(images).reshape(images.shape[0], -1)
    return jnp.matmul(flat, along.T, precision="highest")


def _sort_columns(values: Array, longest: int) -> Array:
    """[N, P] -> [longest, P]: sorts each column and pads it with infinity."""
    return jnp.sort(
        jnp.pad(values, ((0, longest - len(values)), (0, 0)), constant_values=jnp.inf), axis=0
    )


def _step_distance(one: Array, other: Array, n: Array | int, m: Array | int, order: float) -> Array:
    """W_p^p [P] of the first n and m rows of the sorted `one` and `other` [L, P]; n and m may be
    traced."""
    rank = jnp.arange(1, len(one) + 1, dtype=one.dtype)
    # jumps at i/n and j/m; those of padding rows are at 1, where they have no width
    jumps = [jnp.minimum(rank / count, 1) for count in (n, m)]
    edges = jnp.sort(jnp.concatenate([jnp.zeros(1, one.dtype), *jumps]))
    width, middle = edges[1:] - edges[:-1], (edges[1:] + edges[:-1]) / 2
    first, second = (
        sample[jnp.clip(jnp.floor(middle * count).astype(jnp.int32), 0, count - 1)]
        for sample, count in ((one, n), (other, m))
    )
    return width @ jnp.abs(first - second) ** order


def _projected(images: np.ndarray, along: Array, batch_size: int) -> np.ndarray:
    """Projects `batch_size` images at a time -> [N, P]; pads the last batch with the first
    image."""
    found = np.empty((len(images), along.shape[0]), np.float32)
    for start in range(0, len(images), batch_size):
        index = np.arange(start, start + batch_size)
        values = np.asarray(_projector()(images[np.where(index < len(images), index, 0)], along))
        found[start : start + batch_size] = values[: len(images) - start]
    return found


@cached(1)
def _projector() -> Program:
    return Program(_project)


@cached(8)
def _pairwise(order: float) -> Program:
    """(values [K, L, P], counts [K], pairs [Q, 2]) -> W_p^p summed over P, [Q]; one pair in memory
    at a time."""

    def pairwise(values, counts, pairs):
        ordered = jnp.sort(values, axis=1)

        def one(pair):
            a, b = pair
            return _step_distance(ordered[a], ordered[b], counts[a], counts[b], order).sum()

        return jax.lax.map(one, pairs)

    return Program(pairwise)


# ---- of triggers --------------------------------------------------------------------------------
#
# Expected sums of pixel changes, one function per family of Table 1. Derived here, not copied from
# the table: they hold for pixels x uniform on [0, 1] and independent of the trigger. Overwriting
# such a pixel with v changes it by E|x - v| = (v^2 + (1 - v)^2) / 2.


def pixel(count: int = 1, channels: int = 3) -> float:
    """`count` single pixels set to black or white (Gu et al. 2017): count C / 2."""
    return count * channels / 2


def square(side: int, channels: int = 3) -> float:
    """A square of `side` x `side` black and white pixels pasted (Liu et al. 2018): side^2 C / 2."""
    return side**2 * channels / 2


def watermark(pattern: np.ndarray, opacity: np.ndarray | float) -> float:
    """(1 - a) x + a v with a pattern v [H, W, C] at opacity a (a number, or an array that
    broadcasts), as Refool (Liu et al. 2020).

    The sum of a (v^2 + (1 - v)^2) / 2. With opacity 1 inside a mask this is the change of a pasted
    patch.
    """
    pattern = np.asarray(pattern, np.float64)
    return float((opacity * (pattern**2 + (1 - pattern) ** 2) / 2).sum())


def sinusoid(image_shape: Sequence[int], amplitude: float) -> float:
    """d = a sin(2 pi j f / W) added to every row and clipped to [0, 1] (SIG, Barni et al. 2019).

    With clipping, a change d moves a pixel by |d| - d^2 / 2 on average. The sum is H W C (2 a / pi
    - a^2 / 4), for whole periods of several pixels each.
    """
    return math.prod(image_shape) * (2 * amplitude / math.pi - amplitude**2 / 4)


def steganography(image_shape: Sequence[int], bits: int = 2, *, repeated: bool = False) -> float:
    """The lowest `bits` of 8 bits replaced by a message (Li et al. 2020): H W C (4^b - 1) / (3 2^b
    255).

    The mean difference of two numbers uniform on 0..n-1 is (n^2 - 1) / (3 n), n = 2^b. If one bit
    is `repeated` in all of them, as in `attacks.steganography`, the new number is 0 or n - 1 and
    the mean difference is (n - 1) / 2.
    """
    values = 2**bits
    steps = (values - 1) / 2 if repeated else (values**2 - 1) / (3 * values)
    return math.prod(image_shape) * steps / 255


def largest_square(distance: float, channels: int = 3) -> int:
    """Side of the largest square whose pixel changes do not exceed `distance`; section 4.3.1 uses
    it to illustrate distances between classes."""
    return math.isqrt(math.floor(max(2 * distance / channels, 0)))


def pixel_changes(
    key: Key, stamp: Stamp, model: Any, data: Batch, *, batch_size: int = 256
) -> np.ndarray:
    """Sum [N] of |change| over the pixels (in [0, 1]) of each image under `stamp(key, model,
    images)`."""
    return evaluate.per_image(key, _changer(stamp), model, data, batch_size=batch_size)


@cached(32)
def _changer(stamp: Stamp):
    return lambda key, model, images: jnp.abs(stamp(key, model, images) - images).sum((1, 2, 3))
