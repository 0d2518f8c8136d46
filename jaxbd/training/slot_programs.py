"""The compiled programs of a search over slots: fill slots with fresh cells, advance all of them.

Both are a `vmap` over slots of a function of one cell, which is traced once for all widths.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd import devices
from jaxbd.base import Array, ArrayTree, Cell, Inversion, Key, Variables
from jaxbd.caching import cached
from jaxbd.training.program import Program, Time, traced_once

BLANK = np.iinfo(np.int32).max
"""`Slots.made` of a slot without a cell: above any step limit, so the slot never advances."""
PER_SLOT = (0, 2, 3)
"""Positions of the arguments of `Programs.advance` that have a leading axis of slots."""


class Slots(NamedTuple):
    """S cells that advance together; leaves [S, …].

    Attributes:
      state: the inversion's states.
      info: of the cell's last step; zeros before its first.
      made: [S] int32, steps made.
      broke: [S] int32, the first step with a non-finite info; -1 for none.
      recent: infos [S, chunk, …] of the last chunk's steps; None if no course is recorded.
    """

    state: ArrayTree
    info: ArrayTree
    made: Any
    broke: Any
    recent: ArrayTree = None


class Programs(NamedTuple):
    """Compiled functions of all slots; they donate the slots.

    Attributes:
      refill: (slots, taken [S] bool, numbers [S], key, given) -> slots. Where `taken`, the state is
        fresh, with its fields `given` [S, …] replaced.
      advance: (slots, count [], numbers [S], cells [S], limit [], key, variables, data) -> (slots,
        done [S] bool). Makes `count` steps in mode "scan", one step in mode "host".
    """

    refill: Program
    advance: Program


def _choose(condition: Array, yes: ArrayTree, no: ArrayTree) -> ArrayTree:
    return jax.tree.map(functools.partial(jnp.where, condition), yes, no)


def _is_finite(info: ArrayTree) -> Array:
    """[] bool, whether every float in `info` is finite."""
    floats = [leaf for leaf in jax.tree.leaves(info) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return functools.reduce(
        jnp.logical_and, [jnp.isfinite(leaf).all() for leaf in floats], jnp.bool_(True)
    )


def init_cell(inversion: Inversion, key: Key, number: Array) -> ArrayTree:
    """The first state of cell `number`; `key` is the key of the whole search."""
    return inversion.init(jax.random.fold_in(jax.random.fold_in(key, 0), number))


@cached(32)
def step_cell(inversion: Inversion, draw: Callable[..., Any]) -> Callable[..., Any]:
    """(state, number, cell, key, variables, data) -> (state, info): one step of one cell.

    The key depends only on the cell's number and its own step, so slots and chunks do not affect
    the result.
    """

    def step(
        state: ArrayTree, number: Array, cell: Cell, key: Key, variables: Variables, data: Any
    ) -> tuple[ArrayTree, ArrayTree]:
        key = jax.random.fold_in(jax.random.fold_in(key, 1), number)
        draw_key, step_key = jax.random.split(jax.random.fold_in(key, state.step))
        return inversion.step(step_key, state, draw(draw_key, data, cell.source), cell, variables)

    return traced_once(step)


def _is_done(inversion: Inversion, slot: Slots, limit: Array) -> Array:
    """[] bool, whether the cell has made all its steps or has converged."""
    at_end = slot.made >= limit
    return at_end if inversion.converged is None else at_end | inversion.converged(slot.state)


@cached(32)
def _step_slot(inversion: Inversion, draw: Callable[..., Any]) -> Callable[..., Slots]:
    """(slot, number, cell, limit, key, variables, data) -> slot; a done slot stays unchanged."""
    step = step_cell(inversion, draw)

    def stepped(slot: Slots, number: Array, cell: Cell, limit: Array, *shared: Any) -> Slots:
        state, info = step(slot.state, number, cell, *shared)
        broke = jnp.where((slot.broke < 0) & ~_is_finite(info), slot.made, slot.broke)
        recent = slot.recent
        if recent is not None:  # a cell's chunks begin at multiples of the chunk length
            recent = jax.tree.map(
                lambda every, now: every.at[slot.made % every.shape[0]].set(now), recent, info
            )
        new = Slots(state, info, slot.made + 1, broke, recent)
        return _choose(_is_done(inversion, slot, limit), slot, new)

    return stepped


@cached(32)
def programs(inversion: Inversion, draw: Callable[..., Any], over_time: Time) -> Programs:
    """The programs for all slots; cached, so that nothing is traced twice."""
    step_all = jax.vmap(_step_slot(inversion, draw), (0, 0, 0, None, None, None, None))
    all_done = jax.vmap(functools.partial(_is_done, inversion), (0, None))
    fresh = functools.partial(init_cell, inversion)

    def refill(slots: Slots, taken: Array, numbers: Array, key: Key, given: dict) -> Slots:
        states = jax.vmap(fresh, (None, 0))(key, numbers)
        states = states._replace(**given) if given else states
        zero = jnp.zeros_like(slots.made)
        new = Slots(states, jax.tree.map(jnp.zeros_like, slots.info), zero, zero - 1, slots.recent)
        return jax.vmap(_choose)(taken, new, slots)

    def advance(slots, count, numbers, cells, limit, *shared):
        body = lambda _, slots: step_all(slots, numbers, cells, limit, *shared)
        slots = body(0, slots) if over_time == "host" else jax.lax.fori_loop(0, count, body, slots)
        return slots, all_done(slots, limit)

    return Programs(Program(refill, donate=(0,)), Program(advance, donate=(0,)))


def blank_slots(shapes: Slots, width: int) -> Slots:
    """`width` slots without cells, on the default device; `shapes` describes one slot."""
    blank = jax.tree.map(lambda leaf: jnp.zeros((width, *leaf.shape), leaf.dtype), shapes)
    return blank._replace(made=jnp.full((width,), BLANK, jnp.int32))


def slot_shapes(
    inversion: Inversion,
    draw: Callable[..., Any],
    cells: Cell,
    shared: tuple[Key, Variables, Any],
    recent: int,
    over: jax.sharding.Mesh | None,
) -> tuple[Slots, int]:
    """Returns the shapes of one slot and the number of images in a batch. Computes nothing.

    Args:
      shared: key, variables and data, as the programs take them.
      recent: number of steps for which a slot holds infos; 0 for none.
    """
    # same placement as the program's own arguments, or the step would be traced a second time
    struct = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=devices.whole(over))
    like = lambda leaf: struct(leaf.shape, leaf.dtype)
    key, _, data = shared
    cell = jax.tree.map(lambda leaf: struct((), leaf.dtype), cells)
    number, state = struct((), jnp.int32), jax.tree.map(like, jax.eval_shape(inversion.init, key))
    batch = jax.eval_shape(draw, key, data, cell.source)
    _, info = jax.eval_shape(step_cell(inversion, draw), state, number, cell, *shared)
    info = jax.tree.map(like, info)
    course = None
    if recent:
        course = jax.tree.map(lambda leaf: struct((recent, *leaf.shape), leaf.dtype), info)
    drawn = jax.tree.leaves(batch)
    # methods without data work on one image of their own per step
    return Slots(state, info, number, number, course), drawn[0].shape[0] if drawn else 1
