"""The host's side of a search: which cell is in which slot, and the results of the others.

`Table` is immutable: `arrange`, `advance` and `release` return the next one. `Results` are arrays
in host memory that `store` writes in place, because copying 9,900 cells at every chunk would be too
slow.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd import devices
from jaxbd.base import ArrayTree, Cell
from jaxbd.caching import cached
from jaxbd.training import lanes, loop, memory
from jaxbd.training.program import Program
from jaxbd.training.slot_programs import PER_SLOT, Programs, Slots, blank_slots

WAITING, DONE = -1, -2


class Task(NamedTuple):
    """The fixed part of a search.

    Attributes:
      programs: for this inversion and draw.
      shapes: of one slot.
      batch_size: images of one cell in one step.
      cells: [N], NumPy.
      shared: limit, key, variables and data, on the devices.
      given: fields of the first states [N, …] that the caller sets, NumPy.
      over: mesh of the devices in use; None for a single device.
      num_steps: maximum steps of each cell.
      chunk: steps between two visits of the host.
      on_host: whether the mode over time is "host", see `loop`.
      in_lanes: whether groups of slots advance in parallel, see `lanes`.
      course: whether the infos of every step are recorded.
    """

    programs: Programs
    shapes: Slots
    batch_size: int
    cells: Cell
    shared: tuple
    given: dict[str, ArrayTree]
    over: jax.sharding.Mesh | None
    num_steps: int
    chunk: int
    on_host: bool
    in_lanes: bool
    course: bool


class Table(NamedTuple):
    """Where the cells are between two chunks.

    Attributes:
      slots: S of them, on the devices.
      placed: (numbers [S], cells [S]) on the devices; a slot without a cell has those of cell 0.
      numbers: [S] int, the cell in each slot; -1 for none.
      made: [S] int32, steps made by each.
      waiting: numbers of cells that have no slot yet, in order.
      group: slots that advance together in a lane; 0 without lanes.
      widest: S at the start, or after the device last ran out of memory.
      pushed: steps of all slots so far, including slots without a cell.
    """

    slots: Slots
    placed: tuple[Any, Cell]
    numbers: np.ndarray
    made: np.ndarray
    waiting: np.ndarray
    group: int
    widest: int
    pushed: int

    def live(self) -> np.ndarray:
        """Positions of slots that hold a cell."""
        return np.flatnonzero(self.numbers >= 0)


class Results(NamedTuple):
    """Results of the cells; NumPy arrays, written in place.

    Attributes:
      states: [N, …].
      infos: [N], of each cell's last step.
      steps: [N] int32, steps made.
      course: infos [num_steps, N]; nan, or 0 for integers, where no step was made; or None.
    """

    states: ArrayTree
    infos: ArrayTree
    steps: np.ndarray
    course: ArrayTree


def blank_results(task: Task) -> Results:
    """Results before any cell has made a step."""
    total = len(task.cells.target)

    def empty(leaf) -> np.ndarray:
        return np.zeros((total, *leaf.shape), leaf.dtype)

    def unmade(leaf) -> np.ndarray:
        blank = np.nan if jnp.issubdtype(leaf.dtype, jnp.inexact) else 0
        return np.full((task.num_steps, total, *leaf.shape), blank, leaf.dtype)

    states, infos = jax.tree.map(empty, (task.shapes.state, task.shapes.info))
    course = jax.tree.map(unmade, task.shapes.info) if task.course else None
    return Results(states, infos, np.zeros(total, np.int32), course)


def open_table(task: Task, width: int, waiting: np.ndarray, widest: int | None = None) -> Table:
    """A table of `width` slots without cells, rounded up so that all devices have the same number.

    The group size is chosen for `widest`, so that a narrowed batch reuses its programs.
    """
    width = devices.even(width, task.over)
    numbers = np.full(width, -1)
    slots, placed = (
        devices.by_cell(blank_slots(task.shapes, width), task.over),
        place_cells(task, numbers),
    )
    made = np.zeros(width, np.int32)
    table = Table(slots, placed, numbers, made, waiting, 0, widest or width, 0)
    if not task.in_lanes:
        return table
    group = lanes.width(task.programs.advance, _arguments(task, table, 1), PER_SLOT, table.widest)
    return table._replace(group=group)


def place_cells(task: Task, numbers: np.ndarray) -> tuple[Any, Cell]:
    """Puts the number and `Cell` of each slot's cell on the devices, for the programs."""
    # a slot without a cell never advances, so it may read cell 0
    index = np.maximum(numbers, 0)
    cells = jax.tree.map(lambda leaf: jnp.asarray(leaf[index]), task.cells)
    return devices.by_cell((jnp.asarray(index, jnp.int32), cells), task.over)


def _arguments(task: Task, table: Table, count: int) -> tuple:
    """The arguments of `Programs.advance`."""
    return table.slots, devices.on_each(jnp.int32(count), task.over), *table.placed, *task.shared


def bytes_needed(task: Task, table: Table) -> int:
    """Bytes that a step needs, as the compiler reports; in lanes, all slots plus the groups that
    run at the same time."""
    program, arguments = task.programs.advance, _arguments(task, table, 1)
    if not task.in_lanes:
        return memory.needed(program.compiled(*arguments))
    group = lanes.own(arguments, PER_SLOT, 0, table.group)
    under_way = min(lanes.workers(), -(-len(table.numbers) // table.group))
    copies = 3  # before, split into groups, and joined again
    every = copies * sum(leaf.nbytes for leaf in jax.tree.leaves(table.slots))
    return every + under_way * memory.needed(program.compiled(*group))


def steps_ahead(task: Task, table: Table) -> int:
    """Maximum steps that any cell in a slot has left."""
    return task.num_steps - int(table.made[table.live()].min())


def arrange(task: Task, table: Table) -> Table:
    """Moves waiting cells into free slots. In lanes, if none is waiting, narrows the batch.

    On an accelerator the batch keeps its width: compiling another width costs more there than idle
    slots do.
    """
    free = np.flatnonzero(table.numbers < 0)[: len(table.waiting)]
    if len(free):
        return _refill(task, table, free)
    return _narrow(task, table) if task.in_lanes else table


def _refill(task: Task, table: Table, free: np.ndarray) -> Table:
    numbers, made = table.numbers.copy(), table.made.copy()
    numbers[free], made[free] = table.waiting[: len(free)], 0
    taken = np.isin(np.arange(len(numbers)), free)
    given = jax.tree.map(lambda leaf: jnp.asarray(leaf[np.maximum(numbers, 0)]), task.given)
    taken, given = devices.by_cell((jnp.asarray(taken), given), task.over)
    placed = place_cells(task, numbers)
    slots = task.programs.refill(table.slots, taken, placed[0], task.shared[1], given)
    waiting = table.waiting[len(free) :]
    return table._replace(slots=slots, placed=placed, numbers=numbers, made=made, waiting=waiting)


def fitting(count: int, widest: int) -> int:
    """The narrowest batch for `count` cells: a power of two below `widest`, or `widest`. Few widths
    mean few programs to compile."""
    return min(1 << max(count - 1, 0).bit_length(), widest)


def _narrow(task: Task, table: Table) -> Table:
    """Packs the cells into as few whole groups as possible, or into part of a group if more than
    one chunk is left.

    A group of at most `lanes.START` slots stays whole: its idle slot costs less than compiling
    another program.
    """
    live = table.live()
    if table.group < max(len(live), lanes.START + 1):  # all groups share one program
        width = -(-len(live) // table.group) * table.group
    elif steps_ahead(task, table) <= task.chunk:  # too few steps to pay for compiling
        return table
    else:
        width = fitting(len(live), len(table.numbers))
    if width >= len(table.numbers):
        return table
    index = np.concatenate([live, np.full(width - len(live), live[0])])
    slots = jax.tree.map(lambda leaf: jnp.asarray(leaf[index]), devices.fetch(table.slots))
    numbers = np.where(np.arange(width) < len(live), table.numbers[index], -1)
    return table._replace(
        slots=slots, placed=place_cells(task, numbers), numbers=numbers, made=table.made[index]
    )


def advance(task: Task, table: Table) -> tuple[Table, np.ndarray]:
    """Runs one chunk. Returns the next table, and whether each slot is done, [S] bool.

    Raises: loop.NotFinite with the numbers of the cells with non-finite infos.
    """
    count = min(task.chunk, steps_ahead(task, table))
    program, arguments = task.programs.advance, _arguments(task, table, count)
    if task.in_lanes:
        size = min(table.group, len(table.numbers))
        slots, each_done = lanes.advance(program, arguments, PER_SLOT, count, size)
        done = each_done[-1]
    else:
        slots, done = table.slots, None
        for _ in range(count if task.on_host else 1):
            slots, done = program(slots, *arguments[1:])
    done, made, broke = devices.fetch((done, slots.made, slots.broke))
    _check_finite(table, np.asarray(broke))
    pushed = table.pushed + count * len(table.numbers)
    # `made` is BLANK in a slot without a cell; zero it, so that no sum includes it
    made = np.where(table.numbers >= 0, made, 0).astype(np.int32)
    return table._replace(slots=slots, made=made, pushed=pushed), np.asarray(done)


def _check_finite(table: Table, broke: np.ndarray) -> None:
    live = table.live()
    bad = live[broke[live] >= 0]
    if len(bad):
        first = broke[bad].min()
        numbers = table.numbers[bad[broke[bad] == first]]
        raise loop.NotFinite(int(first), tuple(sorted(int(number) for number in numbers)))


def record_course(results: Results, before: Table, after: Table) -> None:
    """Copies the infos of the last chunk's steps into `results.course`."""
    recent = devices.fetch(after.slots.recent)
    for position in after.live():
        first, last = before.made[position], after.made[position]
        number = after.numbers[position]
        for course, leaf in zip(
            jax.tree.leaves(results.course), jax.tree.leaves(recent), strict=True
        ):
            course[first:last, number] = leaf[position, : last - first]


def release(table: Table, positions: np.ndarray) -> Table:
    """Empties the slots at `positions`."""
    numbers = table.numbers.copy()
    numbers[positions] = -1
    return table._replace(numbers=numbers)


@cached(1)
def _picker() -> Program:
    """Program that selects rows of all leaves, so that an accelerator sends only those to the
    host."""
    return Program(lambda tree, index: jax.tree.map(lambda leaf: leaf[index], tree))


def store(task: Task, table: Table, results: Results, positions: np.ndarray) -> None:
    """Copies the slots at `positions` into `results`."""
    found = table.slots.state, table.slots.info
    if task.on_host or len(positions) == len(table.numbers):
        rows = jax.tree.map(lambda leaf: leaf[positions], devices.fetch(found))
    else:  # pad to powers of two, so that few programs serve all counts
        padding = fitting(len(positions), len(table.numbers)) - len(positions)
        index = devices.on_each(jnp.asarray(np.pad(positions, (0, padding))), task.over)
        rows = devices.fetch(_picker()(found, index))
    numbers, count = table.numbers[positions], len(positions)

    def write(result: np.ndarray, leaf: np.ndarray) -> None:
        result[numbers] = leaf[:count]

    jax.tree.map(write, (results.states, results.infos), rows)
    results.steps[numbers] = table.made[positions]
