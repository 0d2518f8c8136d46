"""Over slots: a long list of cells through a fixed number of places of one compiled program.

Cells wait in a list and S of them advance together. A cell that is done leaves for the host's memory, and the next one
takes its slot; when none is left to take it, the batch narrows to a power of two, or to whole groups. What a cell
becomes depends on its number in the list alone: a cell that is done stays as it is until the host looks. The devices in
use have equally many slots each; on a single CPU, groups of slots advance side by side, see `lanes`.
"""

import collections
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbd import devices, lanes, loop, memory, stages
from jaxbd.base import Array, ArrayTree, Cell, Inversion, Key, UserError, Variables
from jaxbd.remembered import remembered

DEFAULT = 32
"""Slots of each device where none are asked for and memory allows."""
BLANK = np.iinfo(np.int32).max
"""Steps made by a slot without a cell: more than any run asks for, so that it never advances."""


class Slots(NamedTuple):
    """What a program carries; leaves [S, …].

    Attributes:
      state: of the inversion.
      info: of the cell's last step; zeros before its first.
      made: [S] int32, steps made.
      broke: [S] int32, the first step whose info was not finite; -1 for none.
      recent: infos [S, chunk, …] of the steps of the last chunk; None where no course is kept.
    """

    state: ArrayTree
    info: ArrayTree
    made: Array
    broke: Array
    recent: ArrayTree = None


class Kept(NamedTuple):
    """What a run needs to go on; NumPy arrays. A cell's place says which of its rows count.

    Attributes:
      states: [N, …], of the cells that are done or in a slot.
      infos: [N], of their last steps.
      steps: [N] int32, steps made by them.
      place: [N] int32, slot of the cell; `WAITING` or `DONE`.
      width, widest: [] int32, slots now and at most; 0 before the start.
      pushed: [] int32, steps of all slots, those without a cell included.
      course: [num_steps, N], infos of all steps made so far; None where it is not kept.
    """

    states: ArrayTree
    infos: ArrayTree
    steps: np.ndarray
    place: np.ndarray
    width: np.ndarray
    widest: np.ndarray
    pushed: np.ndarray
    course: ArrayTree = None


class Progress(NamedTuple):
    """Where a run stands.

    Attributes:
      cells, cells_total: cells that are done, of all.
      steps, steps_total: steps of all cells; a cell that settled early counts as if it had made all of its steps.
      slots: width of the batch.
    """

    cells: int
    cells_total: int
    steps: int
    steps_total: int
    slots: int


class Found(NamedTuple):
    """Result of a run over slots; arrays are NumPy.

    Attributes:
      states: [N, …], of each cell when it was done.
      infos: [N] of each cell's last step; zeros for a cell that was settled before its first.
      steps: [N] int32, steps made by each cell.
      image_steps: images of the steps that were made, sum of `steps` x batch.
      image_steps_pushed: images that went through the victim, those of slots that stood still or were empty included.
      seconds: compiling, and all else.
      slots: the widest batch used; what is left after a device ran out of memory.
      course: infos [num_steps, N] of every step, from a cell's last one on nan (0 for integers); None unless asked for.
    """

    states: ArrayTree
    infos: ArrayTree
    steps: np.ndarray
    image_steps: int
    image_steps_pushed: int
    seconds: loop.Seconds
    slots: int
    course: ArrayTree = None


WAITING, DONE = -1, -2
PER_SLOT = (0, 2, 3)
"""Which arguments of the program have a leading axis of slots."""


def _never(state: ArrayTree) -> bool:
    del state
    return False


def _choose(condition: Array, yes: ArrayTree, no: ArrayTree) -> ArrayTree:
    return jax.tree.map(functools.partial(jnp.where, condition), yes, no)


def _finite(info: ArrayTree) -> Array:
    """[] bool, whether every float in `info` is finite."""
    floats = [leaf for leaf in jax.tree.leaves(info) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return functools.reduce(jnp.logical_and, [jnp.isfinite(leaf).all() for leaf in floats], jnp.bool_(True))


@remembered(32)
def _advance(inversion: Inversion, draw: Callable[..., Any]) -> Callable[..., Any]:
    """One step of one cell; traced once, however many cells a batch has."""

    def advance(state, number, cell, key, victim, data):
        key = jax.random.fold_in(jax.random.fold_in(key, 1), number)
        draw_key, step_key = jax.random.split(jax.random.fold_in(key, state.step))
        return inversion.step(step_key, state, draw(draw_key, data, cell.source), cell, victim)

    return loop.traced_once(advance)


@remembered(32)
def _one(inversion: Inversion, draw: Callable[..., Any]) -> tuple[Callable[..., Any], ...]:
    """(fresh, step, done) of one slot; `step` leaves a slot that is done as it is."""
    advance = _advance(inversion, draw)

    def fresh(key, number):
        return inversion.init(jax.random.fold_in(jax.random.fold_in(key, 0), number))

    def done(slot, limit):
        return (slot.made >= limit) | (inversion.settled or _never)(slot.state)

    def step(slot, number, cell, limit, *rest):
        state, info = advance(slot.state, number, cell, *rest)
        broke = jnp.where((slot.broke < 0) & ~_finite(info), slot.made, slot.broke)
        recent = slot.recent
        if recent is not None:  # a cell begins its chunks at multiples of their length
            recent = jax.tree.map(lambda every, now: every.at[slot.made % every.shape[0]].set(now), recent, info)
        return _choose(done(slot, limit), slot, Slots(state, info, slot.made + 1, broke, recent))

    return fresh, step, done


@remembered(32)
def _programs(inversion: Inversion, draw: Callable[..., Any], over_time: loop.Time) -> tuple[loop.Program, ...]:
    """`refill` and `advance` for all slots at once; kept, so that nothing is traced twice."""
    fresh, step, done = _one(inversion, draw)
    every_step = jax.vmap(step, (0, 0, 0, None, None, None, None))
    every_done = jax.vmap(done, (0, None))

    def refill(slots, taken, numbers, key, given):
        """Fresh states, with the fields that are `given`, where `taken` [S]."""
        states = jax.vmap(fresh, (None, 0))(key, numbers)
        states = states._replace(**given) if given else states
        zero = jnp.zeros_like(slots.made)
        new = Slots(states, jax.tree.map(jnp.zeros_like, slots.info), zero, zero - 1, slots.recent)
        return jax.vmap(_choose)(taken, new, slots)

    def advance(slots, count, numbers, cells, limit, *rest):
        """`count` steps ("scan") or one; returns the slots and [S] bool, which are done."""
        body = lambda _, slots: every_step(slots, numbers, cells, limit, *rest)
        slots = body(0, slots) if over_time == "host" else jax.lax.fori_loop(0, count, body, slots)
        return slots, every_done(slots, limit)

    return loop.Program(refill, donate=(0,)), loop.Program(advance, donate=(0,))


class _Run:
    """One run: the programs, their shared arguments, the cells that wait, and what has been found."""

    def __init__(
        self, key, inversion, draw, data, cells, victim, num_steps, over_time, chunk, given=None, course=False
    ):
        over_time = loop.default_time() if over_time == "auto" else over_time
        self.refill, self.program = _programs(inversion, draw, over_time)
        self.host, self.over = over_time == "host", devices.mesh()
        self.over_lanes, self.group = self.host and self.over is None and lanes.are_default(), 0
        self.cells = jax.tree.map(np.asarray, cells)
        self.total, self.num_steps, self.chunk = len(self.cells.target), num_steps, chunk
        self.limit, *self.shared = devices.on_each((jnp.int32(num_steps), key, victim, data), self.over)
        recent = chunk if course else 0
        self.slot, self.batch_size = _shapes(inversion, draw, self.cells, *self.shared, recent, self.over)
        self.given = {
            name: np.asarray(value, getattr(self.slot.state, name).dtype) for name, value in (given or {}).items()
        }
        empty = lambda tree: jax.tree.map(lambda leaf: np.zeros((self.total, *leaf.shape), leaf.dtype), tree)
        self.states, self.infos = empty(self.slot.state), empty(self.slot.info)
        self.course = jax.tree.map(self.blank_course, self.slot.info) if course else None
        self.steps = np.zeros(self.total, np.int32)
        self.waiting = collections.deque(range(self.total))
        self.numbers = np.zeros(0, int)
        self.widest = self.pushed = 0

    def blank_course(self, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        """[num_steps, N, …]"""
        blank = np.nan if jnp.issubdtype(leaf.dtype, jnp.inexact) else 0
        return np.full((self.num_steps, self.total, *leaf.shape), blank, leaf.dtype)

    def begin(self, width: int) -> None:
        """The widest batch from here on, without cells."""
        self.open(width)
        self.widest = len(self.numbers)
        self.settle_groups()

    def open(self, width: int) -> None:
        """A batch of `width` slots without cells, or of a few more where the devices ask for it."""
        width = devices.even(width, self.over)
        blank = jax.tree.map(lambda leaf: jnp.zeros((width, *leaf.shape), leaf.dtype), self.slot)
        self.slots = devices.by_cell(blank._replace(made=jnp.full((width,), BLANK, jnp.int32)), self.over)
        self.place(np.full(width, -1))
        self.made = np.zeros(width, np.int32)

    def place(self, numbers: np.ndarray) -> None:
        """Notes which cell [S] is in which slot, -1 for none."""
        self.numbers = numbers
        index = np.maximum(numbers, 0)
        placed = jnp.asarray(index, jnp.int32), jax.tree.map(lambda leaf: jnp.asarray(leaf[index]), self.cells)
        self.placed = devices.by_cell(placed, self.over)

    def arguments(self, count: int) -> tuple:
        return (self.slots, devices.on_each(jnp.int32(count), self.over), *self.placed, self.limit, *self.shared)

    def settle_groups(self) -> None:
        """Chooses how many slots advance together, by the widest batch: the same ones when a narrower one goes on."""
        if self.over_lanes:
            self.group = lanes.width(self.program, self.arguments(1), PER_SLOT, self.widest)

    def needed(self) -> int:
        """Bytes that a step takes, as the compiler says; over lanes, of all slots and of the groups under way."""
        if not self.over_lanes:
            return memory.needed(self.program.compiled(*self.arguments(1)))
        group = lanes.own(self.arguments(1), PER_SLOT, 0, self.group)
        under_way = min(lanes.workers(), -(-len(self.numbers) // self.group))
        copies = 3  # as they were, in groups, and joined
        every = copies * sum(leaf.nbytes for leaf in jax.tree.leaves(self.slots))
        return every + under_way * memory.needed(self.program.compiled(*group))

    def live(self) -> np.ndarray:
        """Positions of slots that hold a cell."""
        return np.flatnonzero(self.numbers >= 0)

    def arrange(self) -> None:
        """Waiting cells take free slots; when none waits, the batch narrows to what the cells that are left fill."""
        free = np.flatnonzero(self.numbers < 0)[: len(self.waiting)]
        if len(free):
            numbers, taken = self.numbers.copy(), np.zeros(len(self.numbers), bool)
            numbers[free], taken[free] = [self.waiting.popleft() for _ in free], True
            self.place(numbers)
            self.made[free] = 0
            index = np.maximum(numbers, 0)
            given = {name: jnp.asarray(value[index]) for name, value in self.given.items()}
            taken, given = devices.by_cell((jnp.asarray(taken), given), self.over)
            self.slots = self.refill(self.slots, taken, self.placed[0], self.shared[0], given)
            return
        width = devices.even(fitting(len(self.live()), len(self.numbers)), self.over)
        if 0 < self.group < len(self.live()):  # any number of groups: there is nothing to compile
            width = -(-len(self.live()) // self.group) * self.group
        elif self.ahead() <= self.chunk:  # too little to compile for
            return
        if width < len(self.numbers):
            self.narrow(width)

    def ahead(self) -> int:
        """Most steps that a cell in a slot may still make."""
        return self.num_steps - int(self.made[self.live()].min())

    def narrow(self, width: int) -> None:
        """Moves the cells into a batch of `width`; what is over of it repeats the first and is nobody's."""
        live = self.live()
        index = np.concatenate([live, np.full(width - len(live), live[0])])
        moved = jax.tree.map(lambda leaf: jnp.asarray(leaf[index]), devices.fetch(self.slots))
        self.slots = devices.by_cell(moved, self.over)
        self.made = self.made[index]
        self.place(np.where(np.arange(width) < len(live), self.numbers[index], -1))

    def advance(self) -> None:
        """One chunk; cells that are done leave."""
        count = min(self.chunk, self.ahead())
        arguments = self.arguments(count)
        if self.over_lanes:
            size = min(self.group, len(self.numbers))
            self.slots, done = lanes.advance(self.program, arguments, PER_SLOT, count, size)
            done = done[-1]
        else:
            for _ in range(count if self.host else 1):
                self.slots, done = self.program(self.slots, *arguments[1:])
        self.pushed += count * len(self.numbers)
        done, made, broke = devices.fetch((done, self.slots.made, self.slots.broke))
        live = self.live()
        if (broke[live] >= 0).any():
            first = broke[live][broke[live] >= 0].min()
            raise loop.NotFinite(int(first), tuple(sorted(int(n) for n in self.numbers[live[broke[live] == first]])))
        if self.course is not None:
            self.follow(live, made)
        self.made = np.array(made)
        leaving = live[done[live]]
        if len(leaving):
            self.store(leaving)
            self.numbers = self.numbers.copy()
            self.numbers[leaving] = -1

    def follow(self, positions: np.ndarray, made: np.ndarray) -> None:
        """Copies the infos of the last chunk, after which `made` [S] steps are made, to the host."""
        recent = devices.fetch(self.slots.recent)
        for position in positions:
            first, last, number = self.made[position], made[position], self.numbers[position]

            def add(kept, leaf, position=position, first=first, last=last, number=number):
                kept[first:last, number] = leaf[position, : last - first]

            jax.tree.map(add, self.course, recent)

    def store(self, positions: np.ndarray) -> None:
        """Copies the slots at `positions` to the host."""
        numbers = self.numbers[positions]

        def keep(kept, leaf):
            kept[numbers] = leaf[positions]

        jax.tree.map(keep, (self.states, self.infos), devices.fetch((self.slots.state, self.slots.info)))
        self.steps[numbers] = self.made[positions]

    def kept(self) -> Kept:
        """Where the run stands; the arrays are its own."""
        live, place = self.live(), np.full(self.total, DONE, np.int32)
        place[list(self.waiting)] = WAITING
        place[self.numbers[live]] = live
        if len(live):
            self.store(live)
        counts = (np.asarray(count, np.int32) for count in (len(self.numbers), self.widest, self.pushed))
        return Kept(self.states, self.infos, self.steps, place, *counts, self.course)

    def go_on(self, kept: Kept) -> None:
        """Puts every cell where it was; a slot without a cell is blank, whatever it held."""
        self.states, self.infos, self.steps, self.course = jax.tree.map(
            np.array, (kept.states, kept.infos, kept.steps, kept.course)
        )
        self.widest, self.pushed = int(kept.widest), int(kept.pushed)
        self.waiting = collections.deque(np.flatnonzero(kept.place == WAITING).tolist())
        self.open(int(kept.width))
        numbers = np.flatnonzero(kept.place >= 0)
        positions, placed = kept.place[numbers], self.numbers.copy()
        placed[positions], self.made[positions] = numbers, self.steps[numbers]

        def fill(slot, cells):
            slot = np.array(slot)
            slot[positions] = cells[numbers]
            return jnp.asarray(slot)

        mine = Slots(self.states, self.infos, self.steps, np.full(self.total, -1, np.int32))
        blank = self.slots._replace(recent=None)  # every chunk writes its own
        filled = jax.tree.map(fill, devices.fetch(blank), mine)
        self.slots = devices.by_cell(filled, self.over)._replace(recent=self.slots.recent)
        self.place(placed)
        self.settle_groups()

    def can_shrink(self) -> bool:
        """Whether fewer slots are possible; other machines, whose memory may suffice, would not know of it."""
        return len(self.numbers) > devices.even(1, self.over) and jax.process_count() == 1

    def restart(self, width: int) -> None:
        """Cells in the slots go back to the head of the list and start again in a batch of `width`."""
        self.waiting.extendleft(sorted((int(n) for n in self.numbers[self.live()]), reverse=True))
        self.slots = None  # gone before the next is made
        self.begin(width)

    def progress(self) -> Progress:
        live = self.live()
        finished = self.total - len(self.waiting) - len(live)
        steps = finished * self.num_steps + int(self.made[live].sum())
        return Progress(finished, self.total, steps, self.total * self.num_steps, len(self.numbers))


def _shapes(inversion, draw, cells, key, victim, data, chunk, over) -> tuple[Slots, int]:
    """Shapes of one slot, for a course of `chunk` steps, and images in a batch, without computing anything.

    They lie on the devices as the program's own arguments do, or the step would be traced once for each.
    """
    struct = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=devices.whole(over))
    shape = lambda leaf: struct(leaf.shape, leaf.dtype)
    cell = jax.tree.map(lambda leaf: struct((), leaf.dtype), cells)
    number, state = struct((), jnp.int32), jax.tree.map(shape, jax.eval_shape(inversion.init, key))
    batch = jax.eval_shape(draw, key, data, cell.source)
    _, info = jax.eval_shape(_advance(inversion, draw), state, number, cell, key, victim, data)
    info = jax.tree.map(shape, info)
    recent = jax.tree.map(lambda leaf: struct((chunk, *leaf.shape), leaf.dtype), info) if chunk else None
    return Slots(state, info, number, number, recent), jax.tree.leaves(batch)[0].shape[0]


def fitting(count: int, widest: int) -> int:
    """The narrowest batch for `count` cells: a power of two below `widest`, or `widest`; few programs serve all."""
    return min(1 << max(count - 1, 0).bit_length(), widest)


def even(total: int, widest: int) -> int:
    """The batch, at most `widest`, in which `total` cells of one length are run in equally full waves."""
    return -(-total // -(-total // widest))


def _open(state: _Run, slots: int | None, budget: int | None) -> None:
    """The widest batch within the budget; asked-for slots without a budget are taken as they are."""
    narrowest = devices.even(1, state.over)
    state.begin(even(state.total, slots or DEFAULT * narrowest))
    if slots is not None and budget is None:
        return
    budget = int(devices.from_all(memory.available()).min()) if budget is None else budget
    while (needed := state.needed()) > budget:
        width = len(state.numbers)
        if width == narrowest:
            raise UserError(
                f"one cell needs {needed:,} bytes and the memory budget is {budget:,}; use smaller batches, or raise it"
            )
        state.begin(width // 2)


def run(
    key: Key,
    inversion: Inversion,
    draw: Callable[..., Any],
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
    on_chunk: Callable[[Progress], None] | None = None,
    on_shrink: Callable[[int], None] | None = None,
    keep: stages.Keep = stages.through,
    name: str = "search",
) -> Found:
    """See `sweep.search`, which names the cells of errors.

    Raises: NotFinite with the numbers of the cells whose infos stopped being finite; UserError when a single cell does
      not fit the budget.
    """
    if num_steps < 1 or chunk < 1 or (slots is not None and slots < 1):
        raise UserError(f"a search needs num_steps, chunk, slots >= 1, not {num_steps}, {chunk}, {slots}")
    if not len(cells.target):
        raise UserError("a search without cells; give at least one")
    started = time.perf_counter()
    state = _Run(key, inversion, draw, data, cells, victim, num_steps, over_time, chunk, given, course)
    compiled = lambda: state.refill.compile_seconds + state.program.compile_seconds
    compiled_before = compiled()

    def fit(kept: Kept, left: int, save: Callable[[int, Kept, stages.NoInfo], None]):
        before = state.total * num_steps - left
        if kept.width:
            state.go_on(kept)
        else:
            _open(state, slots, memory_budget)
        if before and on_chunk is not None:
            on_chunk(state.progress())

        def after_chunk() -> None:
            if on_chunk is not None:
                on_chunk(state.progress())
            save(state.progress().steps - before, state.kept(), stages.NoInfo())

        _run(state, after_chunk, on_shrink)
        took = time.perf_counter() - started - compiled() + compiled_before
        return state.kept(), None, loop.Seconds(compiled() - compiled_before, took)

    *_, seconds = keep(name, state.kept(), fit, info=stages.NoInfo, num_steps=state.total * num_steps)
    images = state.batch_size * int(state.steps.sum()), state.batch_size * state.pushed
    return Found(state.states, state.infos, state.steps, *images, seconds, state.widest, state.course)


def _run(state: _Run, after_chunk: Callable[[], None], on_shrink: Callable[[int], None] | None) -> None:
    """Chunk after chunk until all cells are done."""
    while state.waiting or len(state.live()):
        failed = False
        try:
            state.arrange()
            state.advance()
        except jax.errors.JaxRuntimeError as error:
            if not memory.ran_out(error) or not state.can_shrink():
                raise
            failed = True
        if failed:  # outside the handler, whose traceback would keep the old batch alive
            state.restart(len(state.numbers) // 2)
            if on_shrink is not None:
                on_shrink(state.widest)
        else:
            after_chunk()
