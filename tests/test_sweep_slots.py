"""Cells that go through slots end as they would alone: whatever the slots, the chunks, the neighbours, the memory."""

import math
import tracemalloc
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from jaxbd import lanes, loop, memory, slots, sweep
from jaxbd.base import ANY_SOURCE, Batch, Cell, Inversion, UserError
from jaxbd.data import draw
from jaxbd.inversion import neural_cleanse
from jaxbd.models import build

LINEAR = build.from_apply(lambda variables, images: images.reshape(images.shape[0], -1) @ variables["params"]["w"])
DRAW = draw.uniform(8)
PAIRS = sweep.grid(range(4), source=range(4))
KEY = jax.random.key(3)
STEPS = 23
WAYS = pytest.mark.parametrize(
    "width, over_time", [(1, "host"), (3, "host"), (8, "host"), (None, "host"), (3, "scan"), (None, "scan")]
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

    With stop "size" it settles when the shift is large, with "level" after as many steps as the cell's level says.
    """

    def init(key):
        shift = 0.1 * jax.random.normal(key, toys.SHAPE)
        return Nudge(jnp.int32(0), shift, jnp.stack([jax.random.key_data(key).sum(), jnp.uint32(10_000)]))

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

    rules = {"size": lambda state: state.shift.max() > 0.35, "level": lambda state: state.step >= state.mark[1]}
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


def search(inversion, wide, **settings):
    data, victim, cells = wide
    with jax.enable_x64(True):
        return sweep.search(KEY, inversion, DRAW, data, cells, victim, **{"num_steps": STEPS, **settings})


def fit(inversion, wide, num_steps=STEPS):
    data, victim, cells = wide
    with jax.enable_x64(True):
        states, infos, _ = sweep.fit(KEY, inversion, DRAW, data, cells, victim, num_steps=num_steps)
        return jax.device_get(states), infos


@pytest.fixture(scope="module")
def plain(wide):
    return fit(NUDGING, wide)


@pytest.fixture(scope="module")
def settled(wide):
    """What each cell must end as under BY_SIZE: where `fit` has it at the first step after which it is settled."""
    _, infos = fit(NUDGING, wide)
    large = infos.size > 0.35
    steps = np.where(large.any(0), large.argmax(0) + 1, STEPS)
    assert len(set(steps.tolist())) > 4 and steps.min() > 1 and (steps == STEPS).any(), "settings that test nothing"
    by_steps = {int(count): fit(NUDGING, wide, count) for count in set(steps.tolist())}
    pick = lambda tree, index: jax.tree.map(lambda leaf: leaf[index], tree)
    states = [pick(by_steps[int(count)][0], index) for index, count in enumerate(steps)]
    infos = [pick(by_steps[int(count)][1], (-1, index)) for index, count in enumerate(steps)]
    stack = lambda trees: jax.tree.map(lambda *leaves: np.stack(leaves), *trees)
    return stack(states), stack(infos), steps


@WAYS
def test_cells_that_never_settle_end_as_fit_leaves_them(width, over_time, wide, plain):
    for chunk in (1, 5, 20):
        found = search(NUDGING, wide, slots=width, chunk=chunk, over_time=over_time)
        np.testing.assert_array_equal(found.states.mark, plain[0].mark)
        toys.assert_close(found.states, plain[0], 1e-9)
        toys.assert_close(found.infos, jax.tree.map(lambda leaf: leaf[-1], plain[1]), 1e-9)
        assert found.steps.tolist() == [STEPS] * 12
        assert found.image_steps == found.image_steps_pushed == 12 * STEPS * 8


@WAYS
def test_cells_that_settle_stay_as_they_were_whatever_the_slots_and_chunks(width, over_time, wide, settled):
    states, infos, steps = settled
    for chunk in (1, 5, 20):
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
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves((found.states, found.infos, found.steps)))
    assert found.states.shift.shape == (12, *toys.SHAPE) and found.infos.loss.shape == (12,) and found.slots == 4
    assert found.seconds.run > 0


def by_level(stops) -> Cell:
    """Cells that stop after as many steps as told."""
    count = len(stops)
    return Cell(
        jnp.zeros(count, jnp.int32), jnp.full(count, ANY_SOURCE, jnp.int32), jnp.asarray(stops, jnp.float32)
    )  # fmt: skip


def narrow_inputs(stops):
    data = jax.tree.map(jnp.asarray, toys.quadrants(0, 40))
    return data, by_level(stops), {"params": {"w": jnp.zeros((64, 4))}}


def run_levels(stops, inversion=BY_LEVEL, **settings):
    data, cells, victim = narrow_inputs(stops)
    return sweep.search(KEY, inversion, DRAW, data, cells, victim, **{"num_steps": 100, "chunk": 2, **settings})


@pytest.fixture
def whole(monkeypatch):
    """All slots advance as one batch, as on an accelerator."""
    monkeypatch.setattr(lanes, "are_default", lambda: False)


def test_the_batch_narrows_by_few_programs_and_dead_slots_are_not_pushed(whole):
    inversion = nudging("level")
    stops = [2] * 16 + [6 * n for n in range(1, 17)]
    widths = []
    found = run_levels(stops, inversion, slots=16, on_chunk=lambda progress: widths.append(progress.slots))
    assert found.steps.tolist() == stops
    assert sorted(set(widths), reverse=True) == [16, 8, 4, 2, 1] and widths == sorted(widths, reverse=True)
    program = slots._programs(inversion, DRAW, "host")[1]
    assert program.traces == 5 <= math.log2(16) + 1
    at_full_width = 8 * 16 * (2 + max(stops))
    assert found.image_steps <= found.image_steps_pushed < 0.75 * at_full_width
    run_levels(stops, inversion, slots=16)
    assert program.traces == 5, "a second run compiles nothing"


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_groups_advance_side_by_side_and_the_batch_narrows_without_compiling(workers, monkeypatch):
    monkeypatch.setattr(lanes, "workers", lambda: workers)
    monkeypatch.setattr(lanes, "START", 4)
    monkeypatch.setattr(lanes, "TRAFFIC", 1)
    inversion, stops, widths = nudging("level"), [2] * 16 + [6 * n for n in range(1, 17)], []
    found = run_levels(stops, inversion, slots=16, on_chunk=lambda progress: widths.append(progress.slots))
    assert found.steps.tolist() == stops
    assert sorted(set(widths), reverse=True) == [16, 12, 8, 4, 2, 1] and widths == sorted(widths, reverse=True)
    assert slots._programs(inversion, DRAW, "host")[1].traces == 3, "4 slots, 2 and 1"
    with monkeypatch.context() as patch:
        patch.setattr(lanes, "are_default", lambda: False)
        expected = run_levels(stops, inversion, slots=16)
    toys.assert_close(found.states, expected.states, 1e-5)
    assert found.image_steps == expected.image_steps


def test_a_batch_that_goes_on_narrower_keeps_its_groups(monkeypatch):
    """So the programs are those of a run that was not interrupted, and with them the last bits."""
    monkeypatch.setattr(lanes, "workers", lambda: 2)
    data, cells, victim = narrow_inputs([9] * 16)
    run = lambda: slots._Run(KEY, BY_LEVEL, DRAW, data, cells, victim, 100, "host", 2)
    first, second = run(), run()
    first.begin(16)
    assert first.group == 8, "half of the slots for each worker"
    first.waiting.clear()
    first.numbers = np.where(np.arange(16) < 3, np.arange(16), -1)
    first.narrow(4)
    second.go_on(first.kept())
    assert (len(second.numbers), second.group) == (4, first.group)


def test_waiting_cells_take_the_slots_of_those_that_left():
    """One long cell and many short ones: the short ones pass through the other slot meanwhile."""
    found = run_levels([20] + [2] * 10, slots=2)
    assert found.steps.tolist() == [20] + [2] * 10
    assert found.image_steps == found.image_steps_pushed == 8 * 40


def test_waves_are_equally_full():
    assert [slots.even(total, 8) for total in (1, 3, 8, 9, 16, 17, 90)] == [1, 3, 8, 5, 8, 6, 8]
    assert run_levels([2] * 13, slots=12).slots == 7


def test_a_cell_settled_at_its_start_makes_no_step():
    found = run_levels([4] * 5, BY_LEVEL._replace(settled=lambda state: state.step >= 0), slots=2)
    assert found.steps.tolist() == [0] * 5 and found.image_steps == 0
    expected = sweep.init(KEY, BY_LEVEL, by_level([4] * 5))
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

    with pytest.raises(FloatingPointError, match=r"^class 0 at level 9: .*step 4; lower the learning rate"):
        run_levels([7, 7, 8, 9, 8], BY_LEVEL._replace(step=step), slots=2, chunk=7, over_time=over_time)


def needed_by(width: int, inversion=BY_LEVEL) -> int:
    """Bytes of the program of `width` slots."""
    data, cells, victim = narrow_inputs([9] * width)
    run = slots._Run(KEY, inversion, DRAW, data, cells, victim, 100, "host", 2)
    run.begin(width)
    return run.needed()


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
    with pytest.raises(UserError, match=f"one cell needs {needed:,} bytes and the memory budget is {needed - 1:,}"):
        run_levels([5] * 4, memory_budget=needed - 1)


def test_memory_needed_is_arguments_results_and_what_is_between():
    told = SimpleNamespace(
        temp_size_in_bytes=1000, argument_size_in_bytes=200, output_size_in_bytes=30, alias_size_in_bytes=4
    )
    assert memory.needed(SimpleNamespace(memory_analysis=lambda: told)) == 1226
    assert memory.needed(SimpleNamespace(memory_analysis=lambda: None)) == 0
    compiled = jax.jit(lambda x: jnp.sort(x, axis=0)[::-1] @ jnp.sort(x, axis=1)).lower(jnp.zeros((100, 100))).compile()
    assert memory.needed(compiled) > 2 * 4 * 100**2


def test_there_is_memory():
    assert 1e7 < memory.available() < 1e14


class Failing:
    """A program whose device runs out of memory at call number `at`, and always above `width` slots."""

    def __init__(self, program: loop.Program, width: int, at: int = 0, message="RESOURCE_EXHAUSTED: Out of memory"):
        self.program, self.width, self.at, self.message, self.calls = program, width, at, message, 0
        self.compile_seconds = 0.0

    def compiled(self, *args):
        return self

    def __call__(self, state, *args):
        self.calls += 1
        if self.calls == self.at or (self.at == 0 and len(state.made) > self.width):
            jax.tree.map(lambda leaf: leaf.delete(), state)  # a failing program takes the donated state with it
            raise jax.errors.JaxRuntimeError(self.message)
        return self.program(state, *args)


def fail(monkeypatch, **settings):
    monkeypatch.setattr(lanes, "width", lambda program, arguments, split, count: count)
    refill, program = slots._programs(BY_LEVEL, DRAW, "host")
    monkeypatch.setattr(slots, "_programs", lambda *_: (refill, Failing(program, **settings)))


STOPS = [3, 9, 5, 30, 7, 2, 11, 4, 6, 8, 30, 3]


def test_out_of_memory_halves_the_slots_and_changes_no_result(monkeypatch):
    expected = run_levels(STOPS, slots=12)
    for settings in ({"width": 4}, {"width": 12, "at": 1}, {"width": 12, "at": 6}, {"width": 12, "at": 13}):
        with monkeypatch.context() as patch:
            fail(patch, **settings)
            shrunk = []
            found = run_levels(STOPS, slots=12, on_shrink=shrunk.append)
        assert shrunk and found.slots == shrunk[-1]
        assert shrunk == ([6, 3] if settings["width"] == 4 else shrunk[:1])
        np.testing.assert_array_equal(found.steps, STOPS)
        np.testing.assert_array_equal(found.states.mark, expected.states.mark)
        toys.assert_close(found.states, expected.states, 1e-5)
        assert found.image_steps == 8 * sum(STOPS)


@pytest.mark.parametrize("settings", [{"width": 0}, {"width": 12, "at": 2, "message": "INTERNAL: broken"}])
def test_other_errors_and_a_single_slot_too_large_are_not_hidden(settings, monkeypatch):
    fail(monkeypatch, **settings)
    with pytest.raises(jax.errors.JaxRuntimeError):
        run_levels(STOPS, slots=12)


@pytest.mark.parametrize("settings", [{"num_steps": 0}, {"slots": 0}, {"chunk": 0}])
def test_nothing_to_do_is_refused(settings):
    with pytest.raises(UserError, match="needs num_steps, chunk, slots >= 1"):
        run_levels([3, 3], **settings)


def test_no_cells_are_refused():
    with pytest.raises(UserError, match="without cells"):
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
        KEY, inversion, draw.uniform(words), data, cells, victim, num_steps=steps, slots=330, chunk=10
    )
    run(jax.tree.map(lambda leaf: leaf[:330], cells), 1)  # compile apart
    tracemalloc.start()
    found = run(cells, steps)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    np.testing.assert_array_equal(found.states.total, np.repeat(steps * sources[:, None].astype(np.float32), words, 1))
    state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(found.states))
    assert state_bytes < peak < 4 * state_bytes < 4 * len(pairs) * steps * words / 4
