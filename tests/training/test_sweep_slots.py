"""Cells that go through slots end as they would alone: whatever the slots, the chunks, the
neighbours, the memory."""

import random
import signal
import tracemalloc
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import toys

from jaxbd.base import ANY_SOURCE, Batch, Cell, Inversion, UserError
from jaxbd.data import draw
from jaxbd.inversion import neural_cleanse
from jaxbd.models import build
from jaxbd.training import lanes, memory, search_state, slot_programs, slots, sweep, table
from jaxbd.training import run as runs
from jaxbd.training.program import Program
from jaxbd.training.run import Run

LINEAR = build.from_apply(
    lambda variables, images: images.reshape(images.shape[0], -1) @ variables["params"]["w"]
)
DRAW = draw.uniform(8)
PAIRS = sweep.grid(range(4), source=range(4))
KEY = jax.random.key(3)
STEPS = 23
WAYS = pytest.mark.parametrize(
    "width, over_time, chunk",
    [
        (1, "host", 1),
        (3, "host", 5),
        (8, "host", 20),
        (None, "host", 1),
        (3, "scan", 20),
        (None, "scan", 5),
    ],
)
TIMES = pytest.mark.parametrize("over_time", ["host", "scan"])


class Nudge(NamedTuple):
    """A shift [8, 8, 1] of all images, and a mark made of all keys and batches so far."""

    step: jax.Array
    shift: jax.Array
    mark: jax.Array


class Told(NamedTuple):
    """Info: cross-entropy to the target, and the shift's largest value."""

    loss: jax.Array
    size: jax.Array


def nudging(stop: str | None = None) -> Inversion:
    """Gradient descent on a shift that leads a linear net to the target.

    With stop "size" it settles when the shift is large, with "level" after as many steps as the
    cell's level says.
    """

    def init(key):
        shift = 0.1 * jax.random.normal(key, toys.SHAPE)
        return Nudge(
            jnp.int32(0), shift, jnp.stack([jax.random.key_data(key).sum(), jnp.uint32(10_000)])
        )

    def step(key, state, batch, cell, victim):
        def loss(shift):
            logits, _ = LINEAR.apply(victim, batch.images + shift[None])
            return -jax.nn.log_softmax(logits)[:, cell.target].mean()

        value, gradient = jax.value_and_grad(loss)(state.shift)
        shift = state.shift - 0.1 * gradient
        drawn = batch.labels.astype(jnp.uint32).sum() + jax.random.key_data(key).sum()
        stop_at = cell.level.astype(jnp.uint32)
        mark = jnp.stack([3 * state.mark[0] + drawn, stop_at])
        return Nudge(state.step + 1, shift, mark), Told(value, shift.max())

    rules = {
        "size": lambda state: state.shift.max() > 0.35,
        "level": lambda state: state.step >= state.mark[1],
    }
    stamp = lambda key, state, images: images + state.shift[None]
    return Inversion(init, step, stamp, lambda key, state, count: None, rules.get(stop))


NUDGING, BY_SIZE, BY_LEVEL = nudging(), nudging("size"), nudging("level")


@pytest.fixture(scope="module")
def wide():
    """(data, victim, cells) in float64."""
    with jax.enable_x64(True):
        weights = jnp.asarray(0.3 * np.random.default_rng(0).normal(size=(64, 4)))
        data = jax.tree.map(jnp.asarray, toys.quadrants(0, 40, np.float64))
        return data, {"params": {"w": weights}}, toys.widen(PAIRS)


def search(inversion, wide, over_time="auto", **settings):
    data, victim, cells = wide
    run, settings = Run(over_time=over_time), {"num_steps": STEPS, **settings}
    with jax.enable_x64(True):
        return sweep.search(run, "cells", KEY, inversion, DRAW, data, cells, victim, **settings)


def fit(inversion, wide, num_steps=STEPS):
    data, victim, cells = wide
    with jax.enable_x64(True):
        return reference.fit(KEY, inversion, DRAW, data, cells, victim, num_steps=num_steps)


@pytest.fixture(scope="module")
def plain(wide):
    return fit(NUDGING, wide)


@pytest.fixture(scope="module")
def settled(wide):
    """What each cell must end as under BY_SIZE: where `fit` has it at the first step after which it
    is settled."""
    _, infos = fit(NUDGING, wide)
    large = infos.size > 0.35
    steps = np.where(large.any(0), large.argmax(0) + 1, STEPS)
    assert len(set(steps.tolist())) > 4 and steps.min() > 1 and (steps == STEPS).any(), (
        "settings that test nothing"
    )
    by_steps = {int(count): fit(NUDGING, wide, count) for count in set(steps.tolist())}
    pick = lambda tree, index: jax.tree.map(lambda leaf: leaf[index], tree)
    states = [pick(by_steps[int(count)][0], index) for index, count in enumerate(steps)]
    infos = [pick(by_steps[int(count)][1], (-1, index)) for index, count in enumerate(steps)]
    stack = lambda trees: jax.tree.map(lambda *leaves: np.stack(leaves), *trees)
    return stack(states), stack(infos), steps


@WAYS
def test_cells_that_never_settle_end_as_in_the_plain_form(width, over_time, chunk, wide, plain):
    found = search(NUDGING, wide, slots=width, chunk=chunk, over_time=over_time)
    np.testing.assert_array_equal(found.states.mark, plain[0].mark)
    toys.assert_close(found.states, plain[0], 1e-9)
    toys.assert_close(found.infos, jax.tree.map(lambda leaf: leaf[-1], plain[1]), 1e-9)
    assert found.steps.tolist() == [STEPS] * 12
    assert found.image_steps == found.image_steps_pushed == 12 * STEPS * 8


@WAYS
def test_cells_that_settle_stay_as_they_were_whatever_the_slots_and_chunks(
    width, over_time, chunk, wide, settled
):
    states, infos, steps = settled
    found = search(BY_SIZE, wide, slots=width, chunk=chunk, over_time=over_time)
    np.testing.assert_array_equal(found.steps, steps)
    np.testing.assert_array_equal(found.states.mark, states.mark)
    toys.assert_close(found.states, states, 1e-9)
    toys.assert_close(found.infos, infos, 1e-9)
    assert found.image_steps == steps.sum() * 8 <= found.image_steps_pushed
    if (width, chunk) == (1, 1):
        assert found.image_steps == found.image_steps_pushed


def test_neural_cleanse_through_slots_is_neural_cleanse(wide):
    data, _, cells = wide
    with jax.enable_x64(True):
        inversion = neural_cleanse.make(toys.NET, toys.SHAPE, neural_cleanse.Config())
        inputs = data, toys.victim(1, dtype=jnp.float64), cells
        expected, infos = fit(inversion, inputs)
        found = search(inversion, inputs, slots=5)
    toys.assert_close(found.states, expected, 1e-9)
    toys.assert_close(found.infos, jax.tree.map(lambda leaf: leaf[-1], infos), 1e-9)


def test_found_is_numpy_and_counts_the_batch(wide):
    found = search(BY_SIZE, wide, slots=4, num_steps=5)
    assert all(
        type(leaf) is np.ndarray
        for leaf in jax.tree.leaves((found.states, found.infos, found.steps))
    )
    assert (
        found.states.shift.shape == (12, *toys.SHAPE)
        and found.infos.loss.shape == (12,)
        and found.slots == 4
    )
    assert found.seconds.run > 0


def by_level(stops) -> Cell:
    """Cells that stop after as many steps as told."""
    count = len(stops)
    sources = jnp.full(count, ANY_SOURCE, jnp.int32)
    return Cell(jnp.zeros(count, jnp.int32), sources, jnp.asarray(stops, jnp.float32))


def narrow_inputs(stops):
    data = jax.tree.map(jnp.asarray, toys.quadrants(0, 40))
    return data, by_level(stops), {"params": {"w": jnp.zeros((64, 4))}}


def run_levels(stops, inversion=BY_LEVEL, run=None, **settings):
    data, cells, victim = narrow_inputs(stops)
    settings = {"num_steps": 100, "chunk": 2, **settings}
    run = run or Run()
    return sweep.search(run, "levels", KEY, inversion, DRAW, data, cells, victim, **settings)


@pytest.fixture
def whole(monkeypatch):
    """All slots advance as one batch, as on an accelerator."""
    monkeypatch.setattr(lanes, "are_default", lambda: False)


def test_one_batch_keeps_its_width_and_compiles_once(whole):
    """Each width would be compiled, which on an accelerator takes longer than idle slots cost."""
    inversion = nudging("level")
    stops, widths = [2] * 16 + [6 * n for n in range(1, 17)], []
    watched = dict(slots=16, on_chunk=lambda progress: widths.append(progress.slots))
    found = run_levels(stops, inversion, **watched)
    assert found.steps.tolist() == stops and set(widths) == {16}
    programs = slot_programs.programs(inversion, DRAW, "host")
    assert (programs.advance.traces, programs.refill.traces) == (1, 1)
    assert found.image_steps == 8 * sum(stops) < found.image_steps_pushed
    run_levels(stops, inversion, slots=16)
    assert programs.advance.traces == 1, "a second run compiles nothing"


@pytest.mark.parametrize(
    "workers, start, least, programs",
    [(1, 4, [], 1), (2, 4, [], 1), (3, 4, [], 1), (2, 2, [2, 1], 3)],
)
def test_groups_advance_side_by_side_and_the_batch_narrows(
    workers, start, least, programs, monkeypatch
):
    """Whole groups run one program; what is less than a group, and more than a small one, is
    compiled for."""
    monkeypatch.setattr(lanes, "workers", lambda: workers)
    monkeypatch.setattr(lanes, "START", start)
    monkeypatch.setattr(lanes, "width", lambda *_: 4)
    inversion, stops, widths = nudging("level"), [2] * 16 + [6 * n for n in range(1, 17)], []
    found = run_levels(
        stops, inversion, slots=16, on_chunk=lambda progress: widths.append(progress.slots)
    )
    assert found.steps.tolist() == stops
    assert sorted(set(widths), reverse=True) == [16, 12, 8, 4, *least]
    assert widths == sorted(widths, reverse=True)
    assert slot_programs.programs(inversion, DRAW, "host").advance.traces == programs
    with monkeypatch.context() as patch:
        patch.setattr(lanes, "are_default", lambda: False)
        expected = run_levels(stops, inversion, slots=16)
    toys.assert_close(found.states, expected.states, 1e-5)
    assert found.image_steps == expected.image_steps


def task_of(stops, inversion=BY_LEVEL):
    data, cells, victim = narrow_inputs(stops)
    settings = dict(num_steps=100, over_time="host", chunk=2)
    return slots.make_task(KEY, inversion, DRAW, data, cells, victim, **settings)


def test_a_batch_that_goes_on_narrower_keeps_its_groups(monkeypatch):
    """So the programs are those of a run that was not interrupted, and with them the last bits."""
    monkeypatch.setattr(lanes, "workers", lambda: 2)
    task = task_of([9] * 16)
    first = table.open_table(task, 16, np.arange(16))
    assert first.group == 8, "half of the slots for each worker"
    first = table.arrange(task, first)
    narrow = table.arrange(task, table.release(first, np.arange(3, 16)))
    saved = search_state.save_search(task, narrow, table.blank_results(task))
    second, _ = search_state.restore_search(task, saved)
    assert (len(narrow.numbers), len(second.numbers)) == (4, 4)
    assert second.group == narrow.group == 8
    np.testing.assert_array_equal(second.numbers, narrow.numbers)


def test_a_table_is_a_value():
    """What `arrange`, `advance` and `release` are given stays as it was, but for donated slots."""
    task = task_of([9] * 6)
    empty = table.open_table(task, 4, np.arange(6))
    full = table.arrange(task, empty)
    after, done = table.advance(task, full)
    assert empty.waiting.tolist() == list(range(6)) and empty.live().tolist() == []
    assert (full.numbers.tolist(), full.waiting.tolist()) == ([0, 1, 2, 3], [4, 5])
    assert (full.made.tolist(), after.made.tolist(), done.any()) == ([0] * 4, [2] * 4, False)
    left = table.release(after, np.array([1]))
    assert left.numbers.tolist() == [0, -1, 2, 3] and after.numbers.tolist() == [0, 1, 2, 3]


def test_nothing_is_copied_to_the_host_but_what_leaves(whole, monkeypatch):
    """States stay on the device until a cell is done or a checkpoint asks for them."""
    stored, real = [], table.store

    def watched(task, at, results, positions):
        stored.append(len(positions))
        real(task, at, results, positions)

    monkeypatch.setattr(slots, "store", watched)
    monkeypatch.setattr(search_state, "store", watched)
    run_levels([2, 6, 6, 8], slots=4)
    assert stored == [1, 2, 1]


@pytest.mark.parametrize("leaving", [1, 3, 4])
def test_rows_that_leave_are_picked_on_the_device(leaving, monkeypatch):
    """As on an accelerator: over "scan", by a program that gathers them."""
    task = task_of([9] * 4)
    at = table.arrange(task, table.open_table(task, 4, np.arange(4)))
    chosen = np.arange(4)[-leaving:]
    found, expected = table.blank_results(task), table.blank_results(task)
    table.store(task, at, expected, chosen)
    table.store(task._replace(on_host=False), at, found, chosen)
    jax.tree.map(np.testing.assert_array_equal, found[:3], expected[:3])
    assert found.states.shift[chosen].all() and not found.states.shift[: 4 - leaving].any()


def test_waiting_cells_take_the_slots_of_those_that_left():
    """One long cell and many short ones: the short ones pass through the other slot meanwhile."""
    found = run_levels([20] + [2] * 10, slots=2)
    assert found.steps.tolist() == [20] + [2] * 10
    assert found.image_steps == found.image_steps_pushed == 8 * 40


def test_waves_are_equally_full():
    assert [slots.even(total, 8) for total in (1, 3, 8, 9, 16, 17, 90)] == [1, 3, 8, 5, 8, 6, 8]
    assert run_levels([2] * 13, slots=12).slots == 7


def test_a_cell_settled_at_its_start_makes_no_step():
    found = run_levels([4] * 5, BY_LEVEL._replace(converged=lambda state: state.step >= 0), slots=2)
    assert found.steps.tolist() == [0] * 5 and found.image_steps == 0
    expected = reference.init(KEY, BY_LEVEL, by_level([4] * 5))
    toys.assert_close(found.states, jax.device_get(expected), 1e-6)


def test_progress_tells_cells_and_steps_and_ends_complete():
    seen = []
    run_levels([2, 4, 6, 8, 100], slots=2, chunk=2, num_steps=10, on_chunk=seen.append)
    assert [progress.cells for progress in seen] == sorted(progress.cells for progress in seen)
    assert [progress.steps for progress in seen] == sorted(progress.steps for progress in seen)
    assert seen[0] == slots.Progress(1, 5, 10 + 2, 50, 2)
    assert seen[-1] == slots.Progress(5, 5, 50, 50, seen[-1].slots)


def test_what_a_callback_raises_stops_the_run():
    def stop(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_levels([4] * 5, on_chunk=stop)


@TIMES
def test_a_value_that_was_not_finite_is_named_even_when_the_next_one_is(over_time):
    def step(key, state, batch, cell, victim):
        state, info = BY_LEVEL.step(key, state, batch, cell, victim)
        broken = ((state.step == 5) | (state.step == 6)) & (cell.level == 9)
        return state, info._replace(loss=jnp.where(broken, jnp.nan, info.loss))

    with pytest.raises(
        FloatingPointError, match=r"^class 0 at level 9: .*step 4; lower the learning rate"
    ):
        run_levels(
            [7, 7, 8, 9, 8],
            BY_LEVEL._replace(step=step),
            Run(over_time=over_time),
            slots=2,
            chunk=7,
        )


def needed_by(width: int, inversion=BY_LEVEL) -> int:
    """Bytes of the program of `width` slots."""
    task = task_of([9] * width, inversion)
    return table.bytes_needed(task, table.open_table(task, width, np.arange(width)))


def test_slots_are_halved_until_the_program_fits_the_budget(monkeypatch):
    needed = {width: needed_by(width) for width in (1, 4, 8)}
    assert 0 < needed[1] < needed[4] < needed[8]
    monkeypatch.setattr(slots, "DEFAULT", 16)
    stops = [5, 4, 3, 2] * 4
    expected = run_levels(stops)
    assert expected.slots == 16
    for settings in ({}, {"slots": 16}):
        found = run_levels(stops, memory_budget=needed[8] - 1, **settings)
        assert found.slots == 4
        toys.assert_close(found.states, expected.states, 1e-5)
    assert run_levels(stops, memory_budget=needed[8]).slots == 8
    monkeypatch.setattr(memory, "available", lambda: needed[4])
    assert run_levels(stops).slots == 4
    assert run_levels(stops, slots=16).slots == 16, "asked for without a budget"


def test_a_cell_that_does_not_fit_is_refused_with_both_figures():
    needed = needed_by(1)
    with pytest.raises(
        UserError, match=f"one cell needs {needed:,} bytes and the memory budget is {needed - 1:,}"
    ):
        run_levels([5] * 4, memory_budget=needed - 1)


def test_memory_needed_is_arguments_results_and_what_is_between():
    told = SimpleNamespace(
        temp_size_in_bytes=1000,
        argument_size_in_bytes=200,
        output_size_in_bytes=30,
        alias_size_in_bytes=4,
    )
    assert memory.needed(SimpleNamespace(memory_analysis=lambda: told)) == 1226
    assert memory.needed(SimpleNamespace(memory_analysis=lambda: None)) == 0
    compiled = (
        jax.jit(lambda x: jnp.sort(x, axis=0)[::-1] @ jnp.sort(x, axis=1))
        .lower(jnp.zeros((100, 100)))
        .compile()
    )
    assert memory.needed(compiled) > 2 * 4 * 100**2


def test_there_is_memory():
    assert 1e7 < memory.available() < 1e14


def test_what_is_free_of_an_accelerator_is_available(monkeypatch):
    """Of the device that has least, and not what other programs hold."""
    device = lambda **stats: SimpleNamespace(process_index=0, memory_stats=lambda: stats or None)
    full = device(bytes_limit=1000, bytes_in_use=400), device(bytes_limit=1000, bytes_in_use=100)
    monkeypatch.setattr(memory.devices, "in_use", lambda: list(full))
    assert memory.available() == int(memory.DEVICE_SHARE * 600)
    monkeypatch.setattr(memory.devices, "in_use", lambda: [device()])
    assert memory.available() > 1e7, "the machine's, where the device does not say"


class Failing:
    """A program whose device runs out of memory at call number `at`, and always above `width`
    slots."""

    def __init__(
        self,
        program: Program,
        width: int,
        at: int = 0,
        message="RESOURCE_EXHAUSTED: Out of memory",
    ):
        self.program, self.width, self.at, self.message, self.calls = program, width, at, message, 0
        self.compile_seconds = 0.0

    def compiled(self, *args):
        return self

    def __call__(self, state, *args):
        self.calls += 1
        if self.calls == self.at or (self.at == 0 and len(state.made) > self.width):
            jax.tree.map(
                lambda leaf: leaf.delete(), state
            )  # a failing program takes the donated state with it
            raise jax.errors.JaxRuntimeError(self.message)
        return self.program(state, *args)


def fail(monkeypatch, **settings):
    monkeypatch.setattr(lanes, "width", lambda program, arguments, split, count: count)
    programs = slot_programs.programs(BY_LEVEL, DRAW, "host")
    failing = programs._replace(advance=Failing(programs.advance, **settings))
    monkeypatch.setattr(slots, "programs", lambda *_: failing)


STOPS = [3, 9, 5, 30, 7, 2, 11, 4, 6, 8, 30, 3]


def test_out_of_memory_halves_the_slots_and_changes_no_result(monkeypatch):
    expected = run_levels(STOPS, slots=12)
    for settings in (
        {"width": 4},
        {"width": 12, "at": 1},
        {"width": 12, "at": 6},
        {"width": 12, "at": 13},
    ):
        with monkeypatch.context() as patch:
            fail(patch, **settings)
            shrunk = []
            run = Run(notice=lambda line, shrunk=shrunk: shrunk.append(int(line.split()[3])))
            found = run_levels(STOPS, run=run, slots=12)
        assert shrunk and found.slots == shrunk[-1]
        assert shrunk == ([6, 3] if settings["width"] == 4 else shrunk[:1])
        np.testing.assert_array_equal(found.steps, STOPS)
        np.testing.assert_array_equal(found.states.mark, expected.states.mark)
        toys.assert_close(found.states, expected.states, 1e-5)
        assert found.image_steps == 8 * sum(STOPS)


@pytest.mark.parametrize(
    "settings", [{"width": 0}, {"width": 12, "at": 2, "message": "INTERNAL: broken"}]
)
def test_other_errors_and_a_single_slot_too_large_are_not_hidden(settings, monkeypatch):
    fail(monkeypatch, **settings)
    with pytest.raises(jax.errors.JaxRuntimeError):
        run_levels(STOPS, run=Run(notice=lambda line: None), slots=12)


@pytest.mark.parametrize("settings", [{"num_steps": 0}, {"slots": 0}, {"chunk": 0}])
def test_nothing_to_do_is_refused(settings):
    with pytest.raises(
        UserError, match=r"a search needs (num_steps|slots|chunk) of at least 1, got 0"
    ):
        run_levels([3, 3], **settings)


def test_no_cells_are_refused():
    with pytest.raises(UserError, match="at least one cell, got none"):
        run_levels([])


def test_all_pairs_of_a_hundred_classes_fit_in_memory():
    """9,900 states and little else: the infos of all steps would be twenty times that."""
    pairs = [(t, s) for t in range(100) for s in range(100) if s != t]
    targets, sources = np.array(pairs, np.int32).T
    steps, words = 20, 16

    class Sum(NamedTuple):
        step: jax.Array
        total: jax.Array

    def step(key, state, batch, cell, victim):
        del key
        logits, _ = LINEAR.apply(victim, batch.images)
        value = logits[:, cell.target % 4] + cell.source
        return Sum(state.step + 1, state.total + value), value

    inversion = Inversion(lambda key: Sum(jnp.int32(0), jnp.zeros(words)), step, None, None)
    cells = Cell(targets, sources, np.full(len(pairs), 0.9, np.float32))
    victim = {"params": {"w": jnp.zeros((64, 4))}}
    data = Batch(jnp.zeros((100, *toys.SHAPE), jnp.uint8), jnp.arange(100, dtype=jnp.int32))
    run = lambda cells, steps: sweep.search(
        Run(),
        "pairs",
        KEY,
        inversion,
        draw.uniform(words),
        data,
        cells,
        victim,
        num_steps=steps,
        slots=330,
        chunk=10,
    )
    run(jax.tree.map(lambda leaf: leaf[:330], cells), 1)  # compile apart
    tracemalloc.start()
    found = run(cells, steps)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    np.testing.assert_array_equal(
        found.states.total, np.repeat(steps * sources[:, None].astype(np.float32), words, 1)
    )
    state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(found.states))
    assert state_bytes < peak < 4 * state_bytes < 4 * len(pairs) * steps * words / 4


def test_a_search_goes_on_from_any_chunk_bit_for_bit(tmp_path):
    stops, rng, widths = [2, 2, 6, 4, 8, 2, 30, 12, 2, 2, 4], random.Random(0), set()
    whole = run_levels(stops, slots=4)
    ended = []

    def search() -> slots.Found:
        """From the newest checkpoint, until a signal after one chunk or two."""
        left = rng.choice((1, 1, 2))

        def stop_requested() -> int | None:
            nonlocal left
            left -= 1
            return signal.SIGTERM if left <= 0 else None

        saving = runs.Checkpoints(tmp_path / "run", {"seed": 0}, 1000)
        run = runs.Run(checkpoints=saving, stop_requested=stop_requested)
        watch = lambda progress: widths.add(progress.slots)
        return run_levels(stops, run=run, slots=4, on_chunk=watch)

    while True:
        try:
            found = search()
            break
        except runs.Stopped as stopped:
            ended.append(str(stopped))
            if "step 74 of" in ended[-1] or len(ended) > 50:
                pytest.fail(f"it stops for ever: {ended[-1]}")
    assert widths >= {4, 2} and len(ended) > 5
    for name in ("states", "infos", "steps"):
        one, other = (jax.tree.leaves(getattr(each, name)) for each in (found, whole))
        for left, right in zip(one, other, strict=True):
            assert np.asarray(left).tobytes() == np.asarray(right).tobytes()
    assert found.slots == whole.slots == 4
