"""The saved state of a search. A search restored from it continues bit for bit."""

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
    """Everything a search needs to resume, as NumPy arrays. Rows of waiting cells do not count.

    Attributes:
      states: [N, …], of cells that are done or in a slot.
      infos: [N], of their last steps.
      steps: [N] int32, steps they made.
      place: [N] int32, the cell's slot, or `WAITING` or `DONE`.
      width, widest: [] int32, current and maximum number of slots; 0 before the start.
      pushed: [] int32, steps of all slots, including slots without a cell.
      course: [num_steps, N], infos of all steps so far; None if not recorded.
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
    """The state of a search before its first step."""
    results, zero = blank_results(task), np.zeros((), np.int32)
    place = np.full(len(task.cells.target), WAITING, np.int32)
    return SearchState(*results[:3], place, zero, zero, zero, results.course)


def save_search(task: Task, table: Table, results: Results) -> SearchState:
    """The search's current state. It shares its arrays with `results`, which later chunks
    change."""
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
    """Puts every cell back into its slot; slots without a cell start blank."""
    waiting = np.flatnonzero(saved.place == WAITING)
    table = open_table(task, int(saved.width), waiting, int(saved.widest))
    # copied, because arrays read from a checkpoint may be read-only
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

    blank = table.slots._replace(recent=None)  # not restored: every chunk overwrites it
    unbroken = np.full(len(saved.steps), -1, np.int32)
    mine = Slots(saved.states, saved.infos, saved.steps, unbroken)
    filled = devices.by_cell(jax.tree.map(fill, devices.fetch(blank), mine), task.over)
    slots = filled._replace(recent=table.slots.recent)
    placed = place_cells(task, numbers)
    table = table._replace(
        slots=slots, placed=placed, numbers=numbers, made=made, pushed=int(saved.pushed)
    )
    return table, results
