"""Losses of ARGD between the attention relation graphs of a student and a teacher (Xia et al.
2022).

A graph's nodes are the attention maps of a net's layers, and its edges are the distances between
them. An embedding relates every map of the student to every map of the teacher. Maps are [B, H, W],
one per layer, in order of execution.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxbd.base import Array, Key
from jaxbd.models.norm import EPSILON
from jaxbd.repairs.attention import pool

LEAST_DISTANCE, LEAST_NORM = 1e-12, 1e-12
"""Lower limits of an edge's distance, and of the norm by which a map is divided."""


class Linear(NamedTuple):
    """A linear layer with BatchNorm: kernel [I, O], bias [O]; scale [O], shift [O]."""

    kernel: Array
    bias: Array
    scale: Array
    shift: Array


class Embedding(NamedTuple):
    """Parameters of the embedding for n layers and q dimensions.

    Attributes:
      queries, keys: of the teacher's maps, and of the student's; n `Linear`s from 1 to q each.
      bilinear: from q to n q; makes from a key one key for each of the teacher's maps.
      student_place, teacher_place: [n, q], positional embeddings of the layers.
    """

    queries: tuple[Linear, ...]
    keys: tuple[Linear, ...]
    bilinear: Linear
    student_place: Array
    teacher_place: Array


def start_embedding(key: Key, layers: int, dim: int) -> Embedding:
    """Random parameters with PyTorch's initialisation."""
    keys = iter(jax.random.split(key, 4 * layers + 4))

    def linear(inputs: int, outputs: int) -> Linear:
        limit = inputs**-0.5
        draw = lambda *shape: jax.random.uniform(next(keys), shape, minval=-limit, maxval=limit)
        return Linear(
            draw(inputs, outputs), draw(outputs), jnp.ones((outputs,)), jnp.zeros((outputs,))
        )

    # Xavier initialisation
    place = lambda: jax.random.normal(next(keys), (layers, dim)) * (2 / (layers + dim)) ** 0.5
    queries, own_keys = (tuple(linear(1, dim) for _ in range(layers)) for _ in range(2))
    return Embedding(queries, own_keys, linear(dim, layers * dim), place(), place())


def edge_loss(student: Sequence[Array], teacher: Sequence[Array]) -> Array:
    """Mean over pairs of layers of mean_b (d_student - d_teacher)^2 [], with d from `edge`; 0 for
    nets with one layer."""
    pairs = list(itertools.combinations(range(len(student)), 2))
    if not pairs:
        return jnp.zeros(())
    apart = [
        jnp.square(edge(student[i], student[j]) - edge(teacher[i], teacher[j])).mean()
        for i, j in pairs
    ]
    return jnp.stack(apart).mean()


def edge(one: Array, other: Array) -> Array:
    """d [B] = |one - other|^2 / max over the batch, between maps [B, H, W] pooled to the smaller
    size."""
    height, width = min(one.shape[1:], other.shape[1:])
    size = height, width
    difference = pool(one, size) - pool(other, size)
    # the lower limit keeps the division finite if all maps are equal
    distance = jnp.maximum(jnp.square(difference).sum((1, 2)), LEAST_DISTANCE)
    return distance / distance.max()


def embedding_loss(
    embedding: Embedding, student: Sequence[Array], teacher: Sequence[Array]
) -> Array:
    """sum_t mean_b sum_s a_bts mean_hw (v_bs - v_bt)^2 []: squared differences between every map of
    the teacher and every map of the student, weighted by the attention a.

    a [B, T, S] is the softmax over s of (key_bst . query_bt + place_t . place_s) / sqrt(q).
    """
    weights = relate(embedding, student, teacher)
    total = jnp.zeros((), weights.dtype)
    for number, wanted in enumerate(teacher):
        value = _normalise(jnp.square(wanted))
        _, height, width = wanted.shape
        own = [_normalise(pool(jnp.square(each), (height, width))) for each in student]
        apart = jnp.stack([jnp.square(each - value).mean((1, 2)) for each in own], 1)
        total += (apart * weights[:, number]).sum(1).mean()
    return total


def relate(embedding: Embedding, student: Sequence[Array], teacher: Sequence[Array]) -> Array:
    """The attention a [B, T, S] in `embedding_loss`, which sums to 1 over the student's maps."""
    mean = lambda maps: maps.mean((1, 2))[:, None]
    queries = [
        _apply_linear(layer, mean(maps))
        for layer, maps in zip(embedding.queries, teacher, strict=True)
    ]
    keys = [
        jax.nn.relu(_apply_linear(layer, mean(maps)))
        for layer, maps in zip(embedding.keys, student, strict=True)
    ]
    query, key = jnp.stack(queries, 1), jnp.stack(keys, 1)
    count, layers, dim = key.shape
    key = _apply_linear(embedding.bilinear, key.reshape(-1, dim)).reshape(count, layers, -1, dim)
    place = embedding.teacher_place @ embedding.student_place.T
    logits = (jnp.einsum("bstq,btq->bts", key, query) + place[None]) / dim**0.5
    return jax.nn.softmax(logits, axis=2)


def _apply_linear(layer: Linear, x: Array) -> Array:
    """[N, I] -> [N, O], normalised by the moments of the N rows."""
    x = x @ layer.kernel + layer.bias[None]
    centred = x - x.mean(0, keepdims=True)
    spread = jnp.sqrt(jnp.square(centred).mean(0, keepdims=True) + EPSILON)
    return centred / spread * layer.scale[None] + layer.shift[None]


@jax.vmap
def _normalise(maps: Array) -> Array:
    """Divides each map [H, W] by its Euclidean norm."""
    # two `where`s, because the gradient of a square root is not finite at 0
    square = jnp.square(maps).sum()
    norm = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
    return maps / jnp.maximum(norm, LEAST_NORM)
