"""What is saved of a search, and how it goes on from there bit for bit."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd import devices
from jaxbd.base import ArrayTree
from jaxbd.training.slot_programs import Slots
from jaxbd.training.table import (
    DONE,
    WAITING,
    Results,
    Table,
    Task,
    blank_results,
    open_table,
    place_cells,
    store,
)


class SearchState(NamedTuple):
    """What a search needs to go on; NumPy arrays. A cell's place says which of its rows count.

    Attributes:
      states: [N, …], of the cells that are done or in a slot.
      infos: [N], of their last steps.
      steps: [N] int32, steps made by them.
      place: [N] int32, slot of the cell; `WAITING` or `DONE`.
      width, widest: [] int32, slots now and at most; 0 before the start.
      pushed: [] int32, steps of all slots, those without a cell included.
      course: [num_steps, N], infos of all steps so far; None where it is not recorded.
    """

    states: ArrayTree
    infos: ArrayTree
    steps: np.ndarray
    place: np.ndarray
    width: np.ndarray
    widest: np.ndarray
    pushed: np.ndarray
    course: ArrayTree = None


def blank_state(task: Task) -> SearchState:
    """A search that has not begun."""
    results, zero = blank_results(task), np.zeros((), np.int32)
    place = np.full(len(task.cells.target), WAITING, np.int32)
    return SearchState(*results[:3], place, zero, zero, zero, results.course)


def save_search(task: Task, table: Table, results: Results) -> SearchState:
    """Where the search stands; the arrays are those of `results`, which later chunks change."""
    live, place = table.live(), np.full(len(task.cells.target), DONE, np.int32)
    place[table.waiting] = WAITING
    place[table.numbers[live]] = live
    if len(live):
        store(task, table, results, live)
    width, widest, pushed = (
        np.asarray(each, np.int32) for each in (len(table.numbers), table.widest, table.pushed)
    )
    return SearchState(*results[:3], place, width, widest, pushed, results.course)


def restore_search(task: Task, saved: SearchState) -> tuple[Table, Results]:
    """Puts every cell where it was; a slot without a cell is blank, whatever it held."""
    waiting = np.flatnonzero(saved.place == WAITING)
    table = open_table(task, int(saved.width), waiting, int(saved.widest))
    # what a checkpoint was read into may be read-only
    arrays = (saved.states, saved.infos, saved.steps, saved.course)
    results = Results(*jax.tree.map(np.array, arrays))
    cells = np.flatnonzero(saved.place >= 0)
    positions = saved.place[cells]
    numbers, made = table.numbers.copy(), table.made.copy()
    numbers[positions], made[positions] = cells, saved.steps[cells]

    def fill(slot: np.ndarray, saved: np.ndarray) -> jax.Array:
        slot = np.array(slot)
        slot[positions] = saved[cells]
        return jnp.asarray(slot)

    blank = table.slots._replace(recent=None)  # every chunk writes its own
    unbroken = np.full(len(saved.steps), -1, np.int32)
    mine = Slots(saved.states, saved.infos, saved.steps, unbroken)
    filled = devices.by_cell(jax.tree.map(fill, devices.fetch(blank), mine), task.over)
    slots = filled._replace(recent=table.slots.recent)
    placed = place_cells(task, numbers)
    table = table._replace(
        slots=slots, placed=placed, numbers=numbers, made=made, pushed=int(saved.pushed)
    )
    return table, results
