"""A sweep in its plainest forms, to compare searches with: all cells make all steps, as one `vmap`,
one `lax.map`, or one cell after another."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd.base import ArrayTree, Cell, Inversion, Key
from jaxbd.training import loop, sweep

How = Literal["vmap", "map", "loop"]


def cell_keys(key: Key, count: int) -> jax.Array:
    """One key [N] per cell that depends on the cell's number only."""
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(jnp.arange(count))


def init(key: Key, inversion: Inversion, cells: Cell) -> ArrayTree:
    """Fresh states [N, …]."""
    return jax.vmap(inversion.init)(cell_keys(jax.random.fold_in(key, 0), sweep.size(cells)))


def one_cell(inversion: Inversion, draw: Callable[..., Any]) -> Callable[..., Any]:
    """(state, key, cell, variables, data) -> (state, info)"""

    def step(state, key, cell, variables, data):
        draw_key, step_key = jax.random.split(jax.random.fold_in(key, state.step))
        return inversion.step(step_key, state, draw(draw_key, data, cell.source), cell, variables)

    return step


def all_cells(inversion: Inversion, draw: Callable[..., Any], how: How) -> Callable[..., Any]:
    """(states, keys, cells, variables, data) -> (states, infos), all [N, …]; not for "loop"."""
    step = one_cell(inversion, draw)
    if how == "vmap":
        return jax.vmap(step, (0, 0, 0, None, None))

    def mapped(states, keys, cells, variables, data):
        return jax.lax.map(lambda each: step(*each, variables, data), (states, keys, cells))

    return mapped


def fit(
    key: Key,
    inversion: Inversion,
    draw: Callable[..., Any],
    data: Any,
    cells: Cell,
    variables: ArrayTree,
    *,
    how: How = "vmap",
    states: ArrayTree | None = None,
    **settings: Any,
) -> tuple[ArrayTree, ArrayTree]:
    """States [N, …] and infos [num_steps, N] as NumPy; `settings` are those of `loop.run`."""
    count = sweep.size(cells)
    states = init(key, inversion, cells) if states is None else states
    keys, pick = (
        cell_keys(jax.random.fold_in(key, 1), count),
        lambda tree, i: jax.tree.map(lambda leaf: leaf[i], tree),
    )
    if how != "loop":
        advance = all_cells(inversion, draw, how)
        states, infos, _ = loop.run(advance, states, keys, cells, variables, data, **settings)
        return jax.device_get(states), infos
    step = one_cell(inversion, draw)
    found = [
        loop.run(step, pick(states, i), keys[i], pick(cells, i), variables, data, **settings)[:2]
        for i in range(count)
    ]
    every_state, every_info = zip(*found, strict=True)
    join = lambda axis: lambda *leaves: np.stack(leaves, axis)
    return jax.tree.map(join(0), *every_state), jax.tree.map(join(1), *every_info)
