"""Measures the attack success rates of all cells of a sweep at once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd import devices
from jaxbd.base import ANY_SOURCE, Array, ArrayTree, Batch, Cell, Inversion, Key, Net, Variables
from jaxbd.caching import cached
from jaxbd.images import to_float
from jaxbd.metrics.batches import Portion, portions
from jaxbd.training.program import Program
from jaxbd.training.slots import even


@cached(32)
def count_hits(net_apply: Callable[..., Any], stamp: Callable[..., Any]) -> Program:
    """(key, indices [S], states, cells, variables, portion) -> (hits [S], counted images [S]).

    The loop over the portion's batches is part of the program.
    """

    def one(key, number, index, state, cell, variables, images, labels, real):
        key = jax.random.fold_in(jax.random.fold_in(key, number), index)
        logits, _ = net_apply(variables, stamp(key, state, to_float(images)), train=False)
        from_source = jnp.where(cell.source == ANY_SOURCE, True, labels == cell.source)
        counted = real & (labels != cell.target) & from_source
        return (counted & (logits.argmax(-1) == cell.target)).sum(), counted.sum()

    every = jax.vmap(one, (None, None, 0, 0, 0, None, None, None, None))

    def count(
        key: Key,
        indices: Array,
        states: ArrayTree,
        cells: Cell,
        variables: Variables,
        portion: Portion,
    ) -> tuple[Array, Array]:
        batch = lambda each: every(key, each[0], indices, states, cells, variables, *each[1:])
        if portion.numbers.shape[0] == 1:
            return batch(jax.tree.map(lambda leaf: leaf[0], portion))
        hits, counted = jax.lax.map(batch, portion)
        return hits.sum(0), counted.sum(0)

    return Program(count)


def attack_success(
    key: Key,
    net: Net,
    inversion: Inversion,
    states: ArrayTree,
    cells: Cell,
    variables: Variables,
    data: Batch,
    *,
    batch_size: int = 128,
    slots: int | None = None,
) -> np.ndarray:
    """Attack success rate [N] of each cell's recovered triggers on `data` (images uint8 or float,
    labels).

    This is the share of images outside the target class (or of the source class, if the cell has
    one) that the victim assigns to the target when each carries a trigger drawn from the cell's
    state; 0 if no image counts.

    Args:
      states: [N, …], on the device or in host memory.
      variables: those of the victim.
      slots: cells on the device at a time; None for all.
    """
    program, total = count_hits(net.apply, inversion.stamp), len(cells.target)
    over = None if devices.lies_on_several(states) else devices.mesh()
    width = even(total, slots or total)
    key, variables = devices.on_each(jax.tree.map(jnp.asarray, (key, variables)), over)
    uploaded = [
        devices.on_each(jax.tree.map(jnp.asarray, each), over)
        for each in portions(data, batch_size)
    ]
    hits, counted = np.zeros(total), np.zeros(total)
    for start in range(0, total, width):
        index = np.minimum(np.arange(start, start + width), total - 1)  # pads with the last cell
        pick = lambda leaf, index=index: jnp.asarray(leaf if width == total else leaf[index])
        some = jax.tree.map(pick, (states, cells))
        some = devices.by_cell((jnp.asarray(index, jnp.int32), *some), over)
        # queue the programs of all portions before fetching, which waits for the device
        results = devices.fetch([program(key, *some, variables, each) for each in uploaded])
        own = slice(start, min(start + width, total))
        for good, all_counted in results:
            hits[own] += good[: own.stop - start]
            counted[own] += all_counted[: own.stop - start]
    return hits / np.maximum(counted, 1)
