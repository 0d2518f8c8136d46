"""What the drivers over time and cells promise: resuming, donation, one trace, NaN stops the run
and is named."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import toys

from jaxbd.base import ANY_SOURCE, Batch, Cell, Inversion, UserError
from jaxbd.data import draw
from jaxbd.inversion import pixel
from jaxbd.metrics import batches
from jaxbd.models import build
from jaxbd.training import loop, supervised, sweep
from jaxbd.training.program import Program
from jaxbd.training.run import Run

TIMES = pytest.mark.parametrize("over_time", ["host", "scan"])
LINEAR = build.from_apply(
    lambda variables, images: images.reshape(images.shape[0], -1) @ variables["params"]["w"]
)
TRAINER = supervised.make(LINEAR, supervised.Config(num_steps=30))
DRAW, KEY = draw.uniform(8), jax.random.key(3)


class Walk(NamedTuple):
    """A state that counts its steps and sums what it was given."""

    step: jax.Array
    total: jax.Array


def fresh() -> supervised.State:
    return TRAINER.init({"params": {"w": jnp.zeros((64, 4))}})


@pytest.fixture(scope="module")
def data():
    return jax.tree.map(jnp.asarray, toys.quadrants(0, 40))


def train(data, state, steps, over_time="auto", step=TRAINER.step, info=supervised.Info, chunk=5):
    """`Run.fit` of a step on batches of 8."""
    return Run(over_time=over_time).fit(
        "training", KEY, step, DRAW, data, state, info=info, num_steps=steps, chunk=chunk
    )


@TIMES
def test_thirty_steps_are_ten_and_twenty_more_bit_for_bit(over_time, data):
    whole = train(data, fresh(), 30, over_time)
    part = train(data, fresh(), 10, over_time)
    rest = train(data, part.state, 20, over_time)
    assert int(rest.state.step) == 30
    toys.assert_close(rest.state, whole.state, 0)
    toys.assert_close(loop.join_infos([part.infos, rest.infos]), whole.infos, 0)


@TIMES
@pytest.mark.parametrize("steps, chunk", [(7, 3), (6, 3), (2, 5), (0, 5)])
def test_chunks_cover_every_step_once_and_call_back_after_each(over_time, steps, chunk):
    def advance(state, amount):
        return Walk(state.step + 1, state.total + amount), state.step

    start = lambda: Walk(jnp.int32(0), jnp.float32(0))
    settings = dict(num_steps=steps, chunk=chunk, over_time=over_time)
    seen = [
        (each.done, int(each.get_state().step), each.infos.tolist())
        for each in loop.chunks(advance, start(), jnp.float32(2), **settings)
    ]
    ends = [min(first + chunk, steps) for first in range(0, steps, chunk)]
    assert seen == [
        (end, end, list(range(first, end)))
        for first, end in zip(range(0, steps, chunk), ends, strict=True)
    ]
    state, infos, seconds = loop.run(advance, start(), jnp.float32(2), **settings)
    assert (int(state.step), float(state.total)) == (steps, 2.0 * steps)
    assert infos is None if steps == 0 else infos.tolist() == list(range(steps))
    assert seconds.compile >= 0 and seconds.run >= 0


def test_host_and_scan_agree(data):
    one, other = (train(data, fresh(), 12, over_time) for over_time in ("host", "scan"))
    toys.assert_close(one[:2], other[:2], 1e-5)


def test_every_step_has_a_key_of_its_own(data):
    def step(key, state, batch):
        return Walk(state.step + 1, state.total), jax.random.key_data(key)[0]

    made = lambda: train(data, Walk(jnp.int32(0), jnp.float32(0)), 9, step=step).infos
    keys = made()
    assert len(set(keys.tolist())) == 9
    np.testing.assert_array_equal(made(), keys)


def test_every_cell_and_step_has_a_key_and_a_batch_of_its_own(data):
    """The same ones as in the plain form."""

    def step(key, state, batch, cell, victim):
        return Walk(state.step + 1, state.total), (jax.random.key_data(key)[0], batch.images.sum())

    task = counting_inversion()._replace(step=step), DRAW, data, sweep.grid(range(3)), ()
    keys, sums = search(*task, num_steps=4).course
    assert keys.shape == (4, 3) and len(np.unique(keys)) == len(np.unique(sums)) == 12
    np.testing.assert_array_equal(keys, reference.fit(KEY, *task, num_steps=4)[1][0])


def test_the_state_is_donated_and_arguments_are_not():
    program = Program(lambda state, x: (state + x, x), donate=(0,))
    state, x = jnp.zeros(1000), jnp.ones(1000)
    after, _ = program(state, x)
    assert state.is_deleted() and not x.is_deleted() and (after == 1).all()


def test_a_program_traces_once_per_signature():
    program = Program(lambda x: jnp.where(x > 0, x, 1))
    program(jnp.zeros(3))
    program(jnp.ones(3))
    assert program.traces == 1 and program.compile_seconds > 0
    program(jnp.ones(4))
    program(jnp.ones(3, jnp.int32))
    assert program.traces == 3
    program(program(jnp.full((3,), 2.0)))
    assert program.traces == 3, "a weak type is not a new signature"


def blows_up(at: int, leaf: int):
    """Two infos per step, one of which is infinite from step `at` on where the state says so."""

    def advance(state, broken):
        bad = jnp.where((state.step >= at) & broken, jnp.inf, 0.0)
        infos = [jnp.where(state.step >= at + 2, bad, 0.0), state.total]
        infos[leaf] = infos[leaf] + bad
        return state._replace(step=state.step + 1), tuple(infos)

    return advance


@TIMES
@pytest.mark.parametrize("leaf", [0, 1])
def test_the_first_bad_step_is_named_whichever_value_broke(over_time, leaf):
    with pytest.raises(loop.NotFinite) as caught:
        start = Walk(jnp.int32(0), jnp.float32(0))
        loop.run(blows_up(7, leaf), start, True, num_steps=20, chunk=5, over_time=over_time)
    assert (caught.value.step, caught.value.index) == (7, ())


@TIMES
def test_a_run_stops_at_the_chunk_that_broke(over_time):
    done, start = [], Walk(jnp.int32(0), jnp.float32(0))
    with pytest.raises(loop.NotFinite):
        for each in loop.chunks(
            blows_up(7, 0), start, True, num_steps=20, chunk=5, over_time=over_time
        ):
            done.append(each.done)
    assert done == [5]


def search(*task, run=None, **settings):
    """A search that records its course."""
    return sweep.search(run or Run(), "cells", KEY, *task, course=True, **settings)


def counting_inversion() -> Inversion:
    """Sums the level and the victim's bias, so that every number of a run is known."""

    def step(key, state, batch, cell, victim):
        value = cell.level + victim["params"]["bias"]
        return Walk(state.step + 1, state.total + value), value

    stamp = lambda key, state, images: images
    return Inversion(
        lambda key: Walk(jnp.int32(0), jnp.float32(0)), step, stamp, lambda key, state, count: None
    )


@TIMES
def test_nan_stops_a_sweep_and_names_the_cells(over_time, data):
    cells = sweep.grid(range(4), level=(0.5, 0.9))
    cells = cells._replace(level=cells.level.at[5].set(jnp.nan))
    task = counting_inversion(), DRAW, data, cells, {"params": {"bias": jnp.float32(0)}}
    with pytest.raises(FloatingPointError, match=r"class 2 at level nan.*step 0"):
        search(*task, run=Run(over_time=over_time), num_steps=3)


def test_a_victim_with_nan_weights_names_every_cell(data):
    victim = toys.victim(0)
    victim["params"]["gain"] = jnp.float32(jnp.nan)
    inversion = pixel.make(toys.NET, toys.SHAPE, pixel.Config())
    every = r"class 0 at level 0\.9, class 1 at level 0\.9: .*victim's weights"
    with pytest.raises(FloatingPointError, match=every):
        search(inversion, DRAW, data, sweep.grid(range(2)), victim, num_steps=3)


def test_grid_runs_targets_slowest_and_levels_fastest():
    cells = sweep.grid([2, 0], level=(0.5, 0.9))
    np.testing.assert_array_equal(cells.target, [2, 2, 0, 0])
    np.testing.assert_allclose(cells.level, [0.5, 0.9, 0.5, 0.9])
    assert (np.asarray(cells.source) == ANY_SOURCE).all() and sweep.size(cells) == 4
    assert sweep.describe(cells, 1) == "class 2 at level 0.9"


def test_grid_leaves_out_pairs_of_a_class_with_itself():
    cells = sweep.grid(range(3), source=range(3))
    pairs = list(zip(cells.target.tolist(), cells.source.tolist(), strict=True))
    assert pairs == [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]
    assert sweep.describe(cells, 1) == "2 -> 0 at level 0.9"


def test_an_empty_grid_is_refused():
    for settings in (dict(target=[]), dict(target=[1], source=[1]), dict(target=[0], level=())):
        with pytest.raises(UserError, match="empty grid"):
            sweep.grid(**settings)


def test_the_first_cells_of_a_grid_do_not_depend_on_how_many_follow(data):
    inversion = pixel.make(toys.NET, toys.SHAPE, pixel.Config())
    fit = lambda count: (
        search(inversion, DRAW, data, sweep.grid(range(count)), toys.victim(1), num_steps=5).states
    )
    whole, half = fit(4), fit(2)
    toys.assert_close(jax.tree.map(lambda leaf: leaf[:2], whole), half, 1e-5)


def test_batches_pad_the_last_and_say_so():
    data = Batch(np.arange(7)[:, None, None, None], np.arange(7))
    parts = list(batches.batches(data, 3))
    assert [len(labels) for _, labels, _ in parts] == [3, 3, 3]
    real = np.concatenate([real for *_, real in parts])
    np.testing.assert_array_equal(
        np.concatenate([labels for _, labels, _ in parts])[real], np.arange(7)
    )


def test_cells_of_a_source_class_see_its_images_only(data):
    """The toy inversion reports the labels it was given."""

    def step(key, state, batch, cell, victim):
        return Walk(state.step + 1, state.total), (batch.labels == cell.source).mean()

    inversion = counting_inversion()._replace(step=step)
    cells = Cell(jnp.int32([0, 1]), jnp.int32([3, 2]), jnp.float32([0.9, 0.9]))
    found = search(inversion, DRAW, data, cells, toys.victim(0), num_steps=4)
    np.testing.assert_array_equal(found.course, np.ones((4, 2)))
