"""What the drivers over time and cells promise: resuming, donation, one trace, NaN stops the run and is named."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from jaxbd import lanes, loop, supervised, sweep
from jaxbd.base import ANY_SOURCE, Batch, Cell, Inversion, UserError
from jaxbd.data import draw
from jaxbd.inversion import pixel
from jaxbd.models import build

TIMES = pytest.mark.parametrize("over_time", ["host", "scan"])
LINEAR = build.from_apply(lambda variables, images: images.reshape(images.shape[0], -1) @ variables["params"]["w"])
TRAINER = supervised.make(LINEAR, supervised.Config(num_steps=30))
DRAW = draw.uniform(8)


class Walk(NamedTuple):
    """A state that counts its steps and sums what it was given."""

    step: jax.Array
    total: jax.Array


def fresh() -> supervised.State:
    return TRAINER.init({"params": {"w": jnp.zeros((64, 4))}})


@pytest.fixture(scope="module")
def data():
    return jax.tree.map(jnp.asarray, toys.quadrants(0, 40))


@TIMES
def test_thirty_steps_are_ten_and_twenty_more_bit_for_bit(over_time, data):
    fit = lambda state, steps: loop.fit(
        jax.random.key(3), TRAINER.step, DRAW, data, state, num_steps=steps, chunk=5, over_time=over_time
    )
    whole, all_infos, _ = fit(fresh(), 30)
    part, first_infos, _ = fit(fresh(), 10)
    rest, last_infos, _ = fit(part, 20)
    assert int(rest.step) == 30
    toys.assert_close(rest, whole, 0)
    joined = jax.tree.map(lambda a, b: np.concatenate([a, b]), first_infos, last_infos)
    toys.assert_close(joined, all_infos, 0)


@TIMES
def test_a_sweep_resumes_bit_for_bit(over_time, data):
    inversion, cells = pixel.make(toys.NET, toys.SHAPE, pixel.Config()), sweep.grid(range(3))
    settings = dict(chunk=5, over_time=over_time)
    fit = lambda steps, states: sweep.fit(
        jax.random.key(3), inversion, DRAW, data, cells, toys.victim(1), num_steps=steps, states=states, **settings
    )
    whole = fit(30, None)[0]
    rest = fit(20, fit(10, None)[0])[0]
    assert (np.asarray(rest.step) == 30).all()
    toys.assert_close(rest, whole, 0)


@TIMES
@pytest.mark.parametrize("steps, chunk", [(7, 3), (6, 3), (2, 5), (0, 5)])
def test_chunks_cover_every_step_once_and_call_back_after_each(over_time, steps, chunk):
    def advance(state, amount):
        return Walk(state.step + 1, state.total + amount), state.step

    seen = []
    state, infos, seconds = loop.run(
        advance,
        Walk(jnp.int32(0), jnp.float32(0)),
        jnp.float32(2),
        num_steps=steps,
        chunk=chunk,
        over_time=over_time,
        on_chunk=lambda done, state, infos: seen.append((done, int(state.step), infos.tolist())),
    )
    assert (int(state.step), float(state.total)) == (steps, 2.0 * steps)
    starts = range(0, steps, chunk)
    assert seen == [
        (min(s + chunk, steps), min(s + chunk, steps), list(range(s, min(s + chunk, steps)))) for s in starts
    ]
    assert infos is None if steps == 0 else infos.tolist() == list(range(steps))
    assert seconds.compile >= 0 and seconds.run >= 0


def test_host_and_scan_agree(data):
    fit = lambda over_time: loop.fit(
        jax.random.key(3), TRAINER.step, DRAW, data, fresh(), num_steps=12, chunk=4, over_time=over_time
    )
    one, other = fit("host"), fit("scan")
    toys.assert_close(one[:2], other[:2], 1e-5)


def test_every_step_has_a_key_of_its_own(data):
    def step(key, state, batch):
        return Walk(state.step + 1, state.total), jax.random.key_data(key)[0]

    run = lambda: loop.fit(jax.random.key(0), step, DRAW, data, Walk(jnp.int32(0), jnp.float32(0)), num_steps=9)[1]
    keys = run()
    assert len(set(keys.tolist())) == 9
    np.testing.assert_array_equal(run(), keys)


@pytest.mark.parametrize("how", ["lanes", "vmap", "map", "loop"])
def test_every_cell_and_step_has_a_key_and_a_batch_of_its_own(how, data):
    """The same ones however the cells are run."""

    def step(key, state, batch, cell, victim):
        return Walk(state.step + 1, state.total), (jax.random.key_data(key)[0], batch.images.sum())

    inversion, cells = counting_inversion()._replace(step=step), sweep.grid(range(3))
    fit = lambda how: sweep.fit(jax.random.key(0), inversion, DRAW, data, cells, (), num_steps=4, how=how)[1]
    keys, sums = fit(how)
    assert keys.shape == (4, 3) and len(np.unique(keys)) == len(np.unique(sums)) == 12
    np.testing.assert_array_equal(keys, fit("vmap")[0])


def test_the_state_is_donated_and_arguments_are_not():
    program = loop.Program(lambda state, x: (state + x, x), donate=(0,))
    state, x = jnp.zeros(1000), jnp.ones(1000)
    after, _ = program(state, x)
    assert state.is_deleted() and not x.is_deleted() and (after == 1).all()


def test_a_program_traces_once_per_signature():
    program = loop.Program(lambda x: jnp.where(x > 0, x, 1))
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
    done = []
    with pytest.raises(loop.NotFinite):
        loop.run(
            blows_up(7, 0), Walk(jnp.int32(0), jnp.float32(0)), True,
            num_steps=20, chunk=5, over_time=over_time, on_chunk=lambda steps, *_: done.append(steps),
        )  # fmt: skip
    assert done == [5]


def counting_inversion() -> Inversion:
    """Sums the level and the victim's bias, so that every number of a run is known."""

    def step(key, state, batch, cell, victim):
        value = cell.level + victim["params"]["bias"]
        return Walk(state.step + 1, state.total + value), value

    stamp = lambda key, state, images: images
    return Inversion(lambda key: Walk(jnp.int32(0), jnp.float32(0)), step, stamp, lambda key, state, count: None)


@pytest.mark.parametrize("how", ["lanes", "vmap", "map", "loop"])
def test_nan_stops_a_sweep_and_names_the_cells(how, data):
    cells = sweep.grid(range(4), level=(0.5, 0.9))
    cells = cells._replace(level=cells.level.at[5].set(jnp.nan))
    with pytest.raises(FloatingPointError, match=r"class 2 at level nan.*step 0"):
        sweep.fit(
            jax.random.key(0), counting_inversion(), DRAW, data, cells, {"params": {"bias": jnp.float32(0)}},
            num_steps=3, how=how,
        )  # fmt: skip


def test_a_victim_with_nan_weights_names_every_cell(data):
    victim = toys.victim(0)
    victim["params"]["gain"] = jnp.float32(jnp.nan)
    inversion = pixel.make(toys.NET, toys.SHAPE, pixel.Config())
    with pytest.raises(FloatingPointError, match=r"class 0 at level 0\.9, class 1 at level 0\.9: .*victim's weights"):
        sweep.fit(jax.random.key(0), inversion, DRAW, data, sweep.grid(range(2)), victim, num_steps=3)


@pytest.mark.parametrize("how", ["lanes", "vmap", "map", "loop"])
def test_own_victims_go_with_their_cells(how, data):
    cells, biases = sweep.grid(range(3), level=(0.5,)), jnp.array([0.0, 10.0, 20.0])
    states, infos, _ = sweep.fit(
        jax.random.key(0), counting_inversion(), DRAW, data, cells, {"params": {"bias": biases}},
        num_steps=2, how=how, own_victims=True,
    )  # fmt: skip
    np.testing.assert_allclose(states.total, [1, 21, 41])
    np.testing.assert_allclose(infos, [[0.5, 10.5, 20.5]] * 2)


@pytest.mark.parametrize("settings, expected", [({}, 2), ({"group": 1}, 1), ({"group": 3}, 3)])
def test_cells_with_weights_of_their_own_go_one_by_one_over_lanes(settings, expected, data, monkeypatch):
    sizes, real = [], lanes.advance
    watched = lambda program, arguments, split, count, size: (
        sizes.append(size) or real(program, arguments, split, count, size)
    )
    monkeypatch.setattr(lanes, "advance", watched)
    monkeypatch.setattr(lanes, "width", lambda *_: 2)
    cells, bias = sweep.grid(range(3), level=(0.5,)), jnp.zeros(3)
    run = lambda bias, **settings: sweep.fit(
        jax.random.key(0), counting_inversion(), DRAW, data, cells, {"params": {"bias": bias}},
        num_steps=1, how="lanes", over_time="host", **settings,
    )  # fmt: skip
    run(bias[0], **settings)
    run(bias, own_victims=True)
    assert sizes == [expected, 1]


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
    fit = lambda cells: sweep.fit(jax.random.key(5), inversion, DRAW, data, cells, toys.victim(1), num_steps=5)[0]
    whole, half = fit(sweep.grid(range(4))), fit(sweep.grid(range(2)))
    toys.assert_close(jax.tree.map(lambda leaf: leaf[:2], whole), half, 1e-5)


def test_batches_pad_the_last_and_say_so():
    data = Batch(np.arange(7)[:, None, None, None], np.arange(7))
    parts = list(sweep.batches(data, 3))
    assert [len(labels) for _, labels, _ in parts] == [3, 3, 3]
    real = np.concatenate([real for *_, real in parts])
    np.testing.assert_array_equal(np.concatenate([labels for _, labels, _ in parts])[real], np.arange(7))


def test_cells_of_a_source_class_see_its_images_only(data):
    """The toy inversion reports the labels it was given."""

    def step(key, state, batch, cell, victim):
        return Walk(state.step + 1, state.total), (batch.labels == cell.source).mean()

    inversion = counting_inversion()._replace(step=step)
    cells = Cell(jnp.int32([0, 1]), jnp.int32([3, 2]), jnp.float32([0.9, 0.9]))
    infos = sweep.fit(jax.random.key(0), inversion, DRAW, data, cells, toys.victim(0), num_steps=4)[1]
    np.testing.assert_array_equal(infos, np.ones((4, 2)))
