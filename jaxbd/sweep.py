"""Over cells: one method on a whole grid of targets, sources and levels. One of three places that call `jax.jit`."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd import devices, lanes, loop, stages
from jaxbd import slots as over_slots
from jaxbd.base import ANY_SOURCE, Array, ArrayTree, Batch, Cell, Inversion, Key, Net, UserError, Variables
from jaxbd.images import to_float
from jaxbd.remembered import remembered

How = Literal["lanes", "vmap", "map", "loop"]


def default_how() -> How:
    """The default way over cells: "lanes" on CPU, "vmap" elsewhere."""
    return "lanes" if lanes.are_default() else "vmap"


def grid(target: Sequence[int], level: Sequence[float] = (0.9,), source: Sequence[int] = (ANY_SOURCE,)) -> Cell:
    """All combinations as one `Cell` of arrays [N]: targets slowest, then sources, levels fastest.

    Pairs with source == target are left out.
    """
    rows = [(t, s, b) for t in target for s in source for b in level if t != s]
    if not rows:
        raise UserError("an empty grid: give at least one target, one level, and a source other than the target")
    targets, sources, levels = zip(*rows, strict=True)
    return Cell(jnp.array(targets, jnp.int32), jnp.array(sources, jnp.int32), jnp.array(levels, jnp.float32))


def size(cells: Cell) -> int:
    """N, the number of cells."""
    return cells.target.shape[0]


def keys(key: Key, count: int) -> Array:
    """One key [N] per cell that depends on the cell's number only, so how cells are grouped changes nothing."""
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(jnp.arange(count))


def describe(cells: Cell, index: int) -> str:
    """Names one cell for people."""
    source = int(cells.source[index])
    pair = f"class {int(cells.target[index])}" if source == ANY_SOURCE else f"{source} -> {int(cells.target[index])}"
    return f"{pair} at level {float(cells.level[index]):g}"


@remembered(32)
def _advance(
    step: Callable[..., Any], draw: Callable[..., Any], how: How, own_victims: bool, over: Any = None
) -> Callable[..., Any]:
    """`step` for all cells at once ("lanes", "vmap", "map"), or for one ("loop"); "map" gives each device its own."""

    def one(state, key, cell, victim, data):
        draw_key, step_key = jax.random.split(jax.random.fold_in(key, state.step))
        return step(step_key, state, draw(draw_key, data, cell.source), cell, victim)

    victim_axis = 0 if own_victims else None
    if how in ("lanes", "vmap"):
        return jax.vmap(loop.traced_once(one), (0, 0, 0, victim_axis, None))

    def mapped(states, keys, cells, victim, data):
        if own_victims:
            return jax.lax.map(lambda each: one(*each, data), (states, keys, cells, victim))
        return jax.lax.map(lambda each: one(*each, victim, data), (states, keys, cells))

    if over is None or how == "loop":
        return mapped if how == "map" else one
    cell, each = (jax.sharding.PartitionSpec(*axis) for axis in (("cell",), ()))
    places = (cell, cell, cell, cell if own_victims else each, each)
    # with check_vma, zeros made inside count as the same on all devices, and their gradients are added up across them
    return jax.shard_map(mapped, mesh=over, in_specs=places, out_specs=cell, check_vma=False)


@remembered(32)
def _initialiser(init: Callable[..., Any]) -> loop.Program:
    return loop.Program(jax.vmap(init))


def init(key: Key, inversion: Inversion, cells: Cell) -> ArrayTree:
    """Fresh states [N, …], one per cell."""
    return _initialiser(inversion.init)(keys(jax.random.fold_in(key, 0), size(cells)))


def fit(
    key: Key,
    inversion: Inversion,
    draw: Callable[..., Batch],
    data: Any,
    cells: Cell,
    victim: Variables,
    *,
    num_steps: int,
    states: ArrayTree | None = None,
    how: How | None = None,
    own_victims: bool = False,
    group: int | None = None,
    over_time: loop.Time = "auto",
    chunk: int = 20,
    on_chunk: Callable[[int, ArrayTree, ArrayTree], None] | None = None,
) -> tuple[ArrayTree, ArrayTree, loop.Seconds]:
    """Runs `inversion` for every cell; one compiled program serves them all.

    The devices in use share the cells, see `devices`, unless `how` is "loop" or the caller has placed `states` on
    several; results lie on one device all the same.

    Args:
      draw: (key, data, source) -> Batch; every cell draws batches of its own.
      data: whatever `draw` reads, as arrays.
      cells: [N], see `grid`.
      victim: the net's variables, shared; with `own_victims` each leaf has a leading axis [N]. "vmap" then turns
        convolutions into grouped ones, which are slow; "lanes" takes the cells one by one.
      states: to continue from; fresh ones otherwise. Donated.
      how: "vmap", all cells at once; "lanes", groups of them side by side on a CPU's cores (where time goes by a host
        loop; else as "vmap"); "map" (`lax.map`); "loop", one cell after another. All give the same result up to float
        rounding. None: see `default_how`.
      group: cells that advance together under "lanes"; None for as many as suit the caches, 1 with `own_victims`. Give
        1 for a method whose states hold the weights of a net, for the reason above.
    Returns: states [N, …], infos [num_steps, N] as NumPy, seconds.
    Raises: FloatingPointError naming the cell whose values stopped being finite.
    """
    how = default_how() if how is None else how
    states = init(key, inversion, cells) if states is None else states
    cell_keys = keys(jax.random.fold_in(key, 1), size(cells))
    placed = devices.lies_on_several(states)
    over = None if how == "loop" or placed else devices.mesh()
    advance = _advance(inversion.step, draw, how, own_victims, over if how == "map" else None)
    settings = dict(num_steps=num_steps, over_time=over_time, chunk=chunk)
    with _naming(cells):
        if how == "loop":
            return _fit_one_by_one(advance, states, cell_keys, cells, victim, data, own_victims, settings, on_chunk)
        count = size(cells)
        states, cell_keys, cells = devices.by_cell((states, cell_keys, cells), over)
        victim, data = (devices.by_cell if own_victims else devices.on_each)(victim, over), devices.on_each(data, over)
        told = on_chunk if over is None else _telling(on_chunk, over, count)
        if how == "lanes" and over is None and not placed:
            settings |= dict(split=(0, 1, 2, 3) if own_victims else (0, 1, 2), group=1 if own_victims else group)
        states, infos, seconds = loop.run(advance, states, cell_keys, cells, victim, data, **settings, on_chunk=told)
        return devices.home(states, over, count), _first_cells(infos, count), seconds


def compiled_step(
    key: Key,
    inversion: Inversion,
    draw: Callable[..., Batch],
    data: Any,
    cells: Cell,
    victim: Variables,
    *,
    chunk: int = 20,
) -> jax.stages.Compiled:
    """The program of one step of all cells as `fit` runs it with "vmap" on one device, to ask what it costs."""
    states, cell_keys = init(key, inversion, cells), keys(jax.random.fold_in(key, 1), size(cells))
    advance = _advance(inversion.step, draw, "vmap", False)
    return loop.one_step(advance, chunk).compiled(states, cell_keys, cells, victim, data)


def _telling(on_chunk, over, count):
    """`on_chunk` with states and infos of the first `count` cells, on one device."""

    def told(done, states, infos):
        on_chunk(done, devices.home(states, over, count), _first_cells(infos, count))

    return on_chunk and told


def _first_cells(infos: ArrayTree, count: int) -> ArrayTree:
    """Infos [steps, N, …] without the cells from `count` on, which fill up the devices."""
    return jax.tree.map(lambda leaf: leaf[:, :count], infos)


@contextlib.contextmanager
def _naming(cells: Cell):
    """Turns NotFinite into a FloatingPointError that names the cells."""
    try:
        yield
    except loop.NotFinite as error:
        names = ", ".join(describe(cells, index) for index in error.index if index < size(cells))
        raise FloatingPointError(f"{names}: {error}; lower the learning rate or check the victim's weights") from None


def _fit_one_by_one(advance, states, cell_keys, cells, victim, data, own_victims, settings, on_chunk):
    """The host loop over cells: one compiled step serves them all."""
    pick = lambda tree, index: jax.tree.map(lambda leaf: leaf[index], tree)
    finished = []
    for index in range(size(cells)):
        own = pick(victim, index) if own_victims else victim
        try:
            finished.append(
                loop.run(advance, pick(states, index), cell_keys[index], pick(cells, index), own, data, **settings)
            )
        except loop.NotFinite as error:
            raise loop.NotFinite(error.step, (index,)) from None
        if on_chunk is not None:
            on_chunk(settings["num_steps"] * (index + 1) // size(cells), finished[-1][0], finished[-1][1])
    states, infos, seconds = zip(*finished, strict=True)
    states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    infos = jax.tree.map(lambda *leaves: np.stack(leaves, axis=1), *infos)
    return states, infos, loop.total(*seconds)


def search(
    key: Key,
    inversion: Inversion,
    draw: Callable[..., Batch],
    data: Any,
    cells: Cell,
    victim: Variables,
    *,
    num_steps: int,
    slots: int | None = None,
    memory_budget: int | None = None,
    over_time: loop.Time = "auto",
    chunk: int = 20,
    given: Mapping[str, Any] | None = None,
    course: bool = False,
    on_chunk: Callable[[over_slots.Progress], None] | None = None,
    on_shrink: Callable[[int], None] | None = None,
    keep: stages.Keep = stages.through,
    name: str = "search",
) -> over_slots.Found:
    """Runs `inversion` for a long list of cells, `slots` of them at a time; all share the victim.

    A cell is done when `inversion.settled` says so or it has made `num_steps` steps; the next one takes its slot when
    the host looks, after every `chunk` steps. Starts, batches and keys are those of `fit`, so a cell ends the same, up
    to float rounding, whatever `slots` and `chunk` are, and as `fit` leaves it when nothing settles.

    Args:
      slots: at most so many cells at a time; None for 32 (CPU: 16), or fewer where the memory budget asks for it.
      memory_budget: bytes that the compiled program may take for its arguments, results and what is between; slots are
        halved until it does. None for a share of what the device has, see `memory.available`; where `slots` is given,
        for no check.
      given: fields of the fresh states, [N, …] each, that the caller sets: `fit` with such `states` starts the same.
      course: whether to keep the infos of every step, as `fit` does. They lie on the host.
      on_chunk: called after each chunk with how far all cells are; it may print or raise.
      on_shrink: called with the new number of slots after the device ran out of memory; the cells that were in the
        slots start again.
      keep, name: what may save the search and go on from there, and the search's name to it. Its state is `slots.Kept`,
        its steps are those of all cells.
    Returns: states and last infos [N] of every cell as NumPy arrays, see `slots.Found`.
    Raises: FloatingPointError naming the cell whose values stopped being finite; UserError when the budget is too small
      for one cell.
    """
    settings = dict(num_steps=num_steps, slots=slots, memory_budget=memory_budget, over_time=over_time, chunk=chunk)
    with _naming(cells):
        return over_slots.run(
            key, inversion, draw, data, cells, victim, **settings, given=given, course=course,
            on_chunk=on_chunk, on_shrink=on_shrink, keep=keep, name=name,
        )  # fmt: skip


@remembered(32)
def _counter(net_apply: Callable[..., Any], stamp: Callable[..., Any]) -> loop.Program:
    """Hits and counted images of every cell on one batch."""

    def one(key, state, cell, victim, images, labels, real):
        logits, _ = net_apply(victim, stamp(key, state, to_float(images)), train=False)
        from_source = jnp.where(cell.source == ANY_SOURCE, True, labels == cell.source)
        counted = real & (labels != cell.target) & from_source
        return (counted & (logits.argmax(-1) == cell.target)).sum(), counted.sum()

    return loop.Program(jax.vmap(one, (0, 0, 0, None, None, None, None)))


def attack_success(
    key: Key,
    net: Net,
    inversion: Inversion,
    states: ArrayTree,
    cells: Cell,
    victim: Variables,
    data: Batch,
    *,
    batch_size: int = 128,
    slots: int | None = None,
) -> np.ndarray:
    """Attack success rate [N] of each cell's recovered triggers on `data` (images uint8 or float, labels).

    The fraction of images not of the target class (of the source class, where the cell has one) that the victim sends
    to the target when each carries a trigger drawn from the cell's state. `slots` cells at a time are on the device, by
    default all; the others of `states` may lie in host memory.
    """
    program, count = _counter(net.apply, inversion.stamp), size(cells)
    over = None if devices.lies_on_several(states) else devices.mesh()
    width, victim = over_slots.even(count, slots or count), devices.on_each(victim, over)
    hits, counted = np.zeros(count), np.zeros(count)
    for start in range(0, count, width):
        own, group = slice(start, min(start + width, count)), np.minimum(np.arange(start, start + width), count - 1)
        pick = lambda leaf, group=group: jnp.asarray(leaf if width == count else leaf[group])  # repeats the last cell
        some = devices.by_cell(jax.tree.map(pick, (states, cells)), over)
        for number, batch in enumerate(batches(data, batch_size)):
            cell_keys = devices.by_cell(keys(jax.random.fold_in(key, number), count)[group], over)
            good, total = devices.fetch(program(cell_keys, *some, victim, *devices.on_each(batch, over)))
            length = own.stop - own.start
            hits[own], counted[own] = hits[own] + good[:length], counted[own] + total[:length]
    return hits / np.maximum(counted, 1)


def batches(data: Batch, batch_size: int):
    """Yields (images, labels, real [B] bool) of one fixed size; the last batch repeats row 0 where `real` is False."""
    total = len(data.labels)
    for start in range(0, total, batch_size):
        index = np.arange(start, start + batch_size)
        real = index < total
        index = np.where(real, index, 0)
        yield np.asarray(data.images)[index], np.asarray(data.labels)[index], real
