"""Over cells: runs one method on a whole grid of targets, sources and levels."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxbd.base import (
    ANY_SOURCE,
    Batch,
    Cell,
    Inversion,
    Key,
    UserError,
    Variables,
)
from jaxbd.training import loop
from jaxbd.training import slots as over_slots
from jaxbd.training.run import Run
from jaxbd.training.slot_programs import blank_slots


def grid(
    target: Sequence[int], level: Sequence[float] = (0.9,), source: Sequence[int] = (ANY_SOURCE,)
) -> Cell:
    """All combinations as one `Cell` of arrays [N]: targets slowest, then sources, levels fastest.

    Pairs with source == target are left out.
    """
    rows = [(t, s, b) for t in target for s in source for b in level if t != s]
    if not rows:
        raise UserError(
            "an empty grid: give at least one target, one level, and a source other than the target"
        )
    targets, sources, levels = zip(*rows, strict=True)
    return Cell(
        jnp.array(targets, jnp.int32), jnp.array(sources, jnp.int32), jnp.array(levels, jnp.float32)
    )


def size(cells: Cell) -> int:
    """N, the number of cells."""
    return cells.target.shape[0]


def describe(cells: Cell, index: int) -> str:
    """Human-readable name of one cell."""
    target, source = int(cells.target[index]), int(cells.source[index])
    pair = f"class {target}" if source == ANY_SOURCE else f"{source} -> {target}"
    return f"{pair} at level {float(cells.level[index]):g}"


@contextlib.contextmanager
def _naming(cells: Cell) -> Iterator[None]:
    """Converts NotFinite to a FloatingPointError that names the cells."""
    try:
        yield
    except loop.NotFinite as error:
        names = ", ".join(describe(cells, index) for index in error.index)
        raise FloatingPointError(
            f"{names}: {error}; lower the learning rate or check the victim's weights"
        ) from None


def search(
    run: Run,
    name: str,
    key: Key,
    inversion: Inversion,
    draw: Callable[..., Batch],
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
    on_chunk: Callable[[over_slots.Progress], None] | None = None,
) -> over_slots.Found:
    """Runs `inversion` for a long list of cells, `slots` at a time, on one victim.

    A cell is done after `num_steps` steps, or earlier if `inversion.converged`. After every `chunk`
    steps the host gives the slots of finished cells to waiting ones. A cell's result depends only
    on its position in the list, not on `slots` and `chunk`, up to float rounding. `course=True`
    also records the infos of every step.

    Args:
      run: reports, saves and resumes the search as the stage `name`; its steps are those of all
        cells, its state is `slots.SearchState`.
      draw: (key, data, source) -> Batch; every cell draws its own batches.
      data: the arrays that `draw` reads.
      cells: [N], see `grid`.
      variables: the victim's.
      slots: maximum number of cells at a time; None for 32 per device, or fewer if the memory
        budget requires it.
      memory_budget: bytes that the compiled program may take for arguments, results and
        temporaries; slots are halved until it fits. If None, the budget is a share of the free
        memory, see `memory.available`; if None and `slots` is given, nothing is checked.
      given: fields of the first states, [N, …] each, that replace those of `inversion.init`.
      course: whether to record the infos of every step, on the host.
      on_chunk: called after each chunk with the progress of all cells; it may print or raise.
    Returns: states and last infos [N] of every cell as NumPy arrays, see `slots.Found`.
    Raises: FloatingPointError naming the cells with non-finite values; UserError when the budget is
      too small for one cell.
    """
    with _naming(cells):
        return over_slots.search(
            run,
            name,
            key,
            inversion,
            draw,
            data,
            cells,
            variables,
            num_steps=num_steps,
            slots=slots,
            memory_budget=memory_budget,
            chunk=chunk,
            given=given,
            course=course,
            on_chunk=on_chunk,
        )


def compile_step(
    key: Key,
    inversion: Inversion,
    draw: Callable[..., Batch],
    data: Any,
    cells: Cell,
    variables: Variables,
) -> jax.stages.Compiled:
    """Compiles one step of all cells at once, to inspect its cost; computes nothing."""
    # mode "host", so that the program is a single step
    task = over_slots.make_task(
        key, inversion, draw, data, cells, variables, num_steps=1, over_time="host"
    )
    width = size(cells)
    placed = jnp.arange(width, dtype=jnp.int32), cells
    arguments = blank_slots(task.shapes, width), jnp.int32(1), *placed, *task.shared
    return task.programs.advance.compiled(*arguments)
