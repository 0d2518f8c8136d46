"""Over slots: runs N cells through at most S slots of one compiled program (continuous batching).

After each chunk the host stores finished cells and loads waiting ones. A finished cell does not
change before the host stores it, so a cell's result depends only on its number in the list. All
devices in use have the same number of slots. On a single CPU, groups of slots advance in parallel,
see `lanes`.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd import devices
from jaxbd.base import ArrayTree, Cell, Inversion, Key, UserError, Variables
from jaxbd.training import lanes, memory
from jaxbd.training.loop import Chunk
from jaxbd.training.program import Seconds, Time, default_time
from jaxbd.training.run import NoInfo, Run
from jaxbd.training.search_state import SearchState, blank_state, restore_search, save_search
from jaxbd.training.slot_programs import programs, slot_shapes
from jaxbd.training.table import (
    DONE,
    WAITING,
    Results,
    Table,
    Task,
    advance,
    arrange,
    bytes_needed,
    open_table,
    record_course,
    release,
    store,
)

__all__ = ["DONE", "WAITING", "Found", "Progress", "SearchState", "even", "make_task", "search"]

DEFAULT = 32
"""Default number of slots per device, if memory allows."""


class Progress(NamedTuple):
    """How far a search is.

    Attributes:
      cells, cells_total: number of finished cells, and of all cells.
      steps, steps_total: steps made, and all steps, summed over cells; a cell that converged early
        counts with all of its steps.
      slots: width of the batch.
    """

    cells: int
    cells_total: int
    steps: int
    steps_total: int
    slots: int


class Found(NamedTuple):
    """Result of a search; arrays are NumPy.

    Attributes:
      states: [N, …], each cell's last state.
      infos: [N], of each cell's last step; zeros for a cell that converged before its first.
      steps: [N] int32, steps made by each cell.
      image_steps: images processed by cells: sum of `steps` x batch size.
      image_steps_pushed: images that went through the victim, including those of idle and empty
        slots.
      seconds: compile time and all other time.
      slots: the widest batch used, after any halving because a device ran out of memory.
      course: infos [num_steps, N] of every step; nan (0 for integers) after a cell's last step.
        None unless requested.
    """

    states: ArrayTree
    infos: ArrayTree
    steps: np.ndarray
    image_steps: int
    image_steps_pushed: int
    seconds: Seconds
    slots: int
    course: ArrayTree = None


def even(total: int, widest: int) -> int:
    """Batch width, at most `widest`, that runs `total` cells of equal length in evenly filled
    waves."""
    return -(-total // -(-total // widest))


def make_task(
    key: Key,
    inversion: Inversion,
    draw: Callable[..., Any],
    data: Any,
    cells: Cell,
    variables: Variables,
    *,
    num_steps: int,
    chunk: int = 20,
    over_time: Time = "auto",
    given: Mapping[str, Any] | None = None,
    course: bool = False,
) -> Task:
    """The fixed part of a search, see `Task`. Uploads its arrays to the devices, once."""
    over_time = default_time() if over_time == "auto" else over_time
    over, on_host = devices.mesh(), over_time == "host"
    cells = jax.tree.map(np.asarray, cells)
    # `limit` is an array, so that searches of any length share one program
    limit, *shared = devices.on_each(
        jax.tree.map(jnp.asarray, (jnp.int32(num_steps), key, variables, data)), over
    )
    shapes, batch_size = slot_shapes(
        inversion, draw, cells, tuple(shared), chunk if course else 0, over
    )
    fields = {
        name: jax.tree.map(
            lambda leaf, like: np.asarray(leaf, like.dtype), value, getattr(shapes.state, name)
        )
        for name, value in (given or {}).items()
    }
    return Task(
        programs(inversion, draw, over_time),
        shapes,
        batch_size,
        cells,
        (limit, *shared),
        fields,
        over,
        num_steps,
        chunk,
        on_host,
        on_host and over is None and lanes.are_default(),
        course,
    )


def search(
    run: Run,
    name: str,
    key: Key,
    inversion: Inversion,
    draw: Callable[..., Any],
    data: Any,
    cells: Cell,
    variables: Variables,
    *,
    num_steps: int,
    slots: int | None = None,
    memory_budget: int | None = None,
    chunk: int = 20,
    given: Mapping[str, Any] | None = None,
    course: bool = False,
    on_chunk: Callable[[Progress], None] | None = None,
) -> Found:
    """See `sweep.search`, which also names the cells in errors.

    Raises: loop.NotFinite with the numbers of the cells with non-finite infos; UserError when a
      single cell does not fit the budget.
    """
    for what, value in (("num_steps", num_steps), ("chunk", chunk), ("slots", slots)):
        if value is not None and value < 1:
            raise UserError(f"a search needs {what} of at least 1, got {value}")
    if not len(cells.target):
        raise UserError("a search needs at least one cell, got none")
    task = make_task(
        key,
        inversion,
        draw,
        data,
        cells,
        variables,
        num_steps=num_steps,
        chunk=chunk,
        over_time=run.over_time,
        given=given,
        course=course,
    )
    total = len(task.cells.target) * num_steps

    def chunks(saved: SearchState, left: int) -> Iterator[Chunk]:
        before = total - left
        for progress, get_state in _chunks(task, saved, run, slots, memory_budget):
            if on_chunk is not None:
                on_chunk(progress)
            yield Chunk(progress.steps - before, get_state, NoInfo())

    fitted = run.follow(name, blank_state(task), chunks, info=NoInfo, num_steps=total)
    return _make_found(task, fitted.state, fitted.seconds)


def _make_found(task: Task, state: SearchState, seconds: Seconds) -> Found:
    return Found(
        state.states,
        state.infos,
        state.steps,
        image_steps=task.batch_size * int(state.steps.sum()),
        image_steps_pushed=task.batch_size * int(state.pushed),
        seconds=seconds,
        slots=int(state.widest),
        course=state.course,
    )


def _chunks(
    task: Task, saved: SearchState, run: Run, slots: int | None, budget: int | None
) -> Iterator[tuple[Progress, Callable[[], SearchState]]]:
    """Runs chunks until all cells are done; halves the slots when the device runs out of
    memory."""
    if saved.width:
        table, results = restore_search(task, saved)
    else:
        results = Results(saved.states, saved.infos, saved.steps, saved.course)
        table = _open(task, slots, budget)
    while len(table.waiting) or len(table.live()):
        failed = False
        try:
            table = _run_chunk(task, table, results)
        except jax.errors.JaxRuntimeError as error:
            if not memory.ran_out(error) or not _can_halve(task, table):
                raise
            failed = True
        if failed:  # outside the handler: its traceback would keep the old batch in memory
            width, pushed = len(table.numbers) // 2, table.pushed
            waiting = np.sort(np.concatenate([table.numbers[table.live()], table.waiting]))
            del table  # free its arrays before allocating new ones
            table = open_table(task, width, waiting)._replace(pushed=pushed)
            run.notice(f"out of memory: {table.widest} cells at a time from here on")
        else:
            # bound late on purpose: a lambda that held this table would keep its batch in memory
            yield _progress(task, table), lambda: save_search(task, table, results)  # noqa: B023


def _run_chunk(task: Task, table: Table, results: Results) -> Table:
    """Loads waiting cells, advances all slots, stores finished cells."""
    before = arrange(task, table)
    table, done = advance(task, before)
    if task.course:
        record_course(results, before, table)
    live = table.live()
    leaving = live[done[live]]
    if len(leaving):
        store(task, table, results, leaving)
        table = release(table, leaving)
    return table


def _can_halve(task: Task, table: Table) -> bool:
    """Whether the number of slots can be halved. Not with several processes: those with enough
    memory would not know that another one halved."""
    return len(table.numbers) > devices.even(1, task.over) and jax.process_count() == 1


def _open(task: Task, slots: int | None, budget: int | None) -> Table:
    """Opens the widest batch within the budget. A requested number of slots without a budget is not
    checked."""
    total, narrowest = len(task.cells.target), devices.even(1, task.over)
    free = None if slots is not None and budget is None else budget
    if slots is None and budget is None:  # before the first batch takes part of the memory
        free = int(devices.from_all(memory.available()).min())
    table = open_table(task, even(total, slots or DEFAULT * narrowest), np.arange(total))
    while free is not None and (needed := bytes_needed(task, table)) > free:
        width = len(table.numbers)
        if width == narrowest:
            raise UserError(
                f"one cell needs {needed:,} bytes and the memory budget is {free:,}; use smaller"
                " batches, or raise it"
            )
        del table
        table = open_table(task, width // 2, np.arange(total))
    return table


def _progress(task: Task, table: Table) -> Progress:
    total, live = len(task.cells.target), table.live()
    finished = total - len(table.waiting) - len(live)
    steps = finished * task.num_steps + int(table.made[live].sum())
    return Progress(finished, total, steps, total * task.num_steps, len(table.numbers))
