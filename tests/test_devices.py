"""Many devices give what one gives, without a word between them during a sweep; a grid and a second victim are traced
once. On eight forced CPU devices."""

import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from test_sweep_slots import BY_SIZE, KEY, LINEAR, NUDGING

from jaxbd import devices, erase, loop, slots, supervised, sweep, workflow
from jaxbd.base import Inversion, UserError
from jaxbd.data import draw
from jaxbd.inversion import mesa
from jaxbd.models import build
from jaxbd.repair import dhbe

COLLECTIVE = re.compile(r"\b(all-reduce|all-gather|collective-permute|all-to-all|reduce-scatter)\b")
DRAW = draw.uniform(6)
GRID = dict(target=range(4), level=(0.5, 0.8, 0.9))
"""Twelve cells: sixteen places on eight devices."""
CONFIG = mesa.Config(hidden=8, noise_dim=8, place="searched")
INVERSION = mesa.make(toys.NET, toys.SHAPE, CONFIG)


@pytest.fixture
def use(monkeypatch):
    """use(count): the devices in use from here on."""
    assert jax.device_count() >= 8
    return lambda count: monkeypatch.setenv(devices.LIMIT, str(count))


@pytest.fixture
def wide():
    with jax.enable_x64(True):
        yield jax.tree.map(jnp.asarray, toys.quadrants(0, 24, np.float64))


def collectives(program: loop.Program) -> list[set[str]]:
    """What the devices exchange in each compiled form of `program` that runs on several."""
    forms = [form for form in program._compiled.values() if spread_over(form) > 1]
    return [set(COLLECTIVE.findall(form.as_text())) for form in forms]


def spread_over(compiled) -> int:
    return max(len(sharding.device_set) for sharding in jax.tree.leaves(compiled.output_shardings))


def fit(data, how="vmap", over_time="host", **settings):
    """States and infos of a small float64 grid of MESA."""
    cells = sweep.grid(**GRID)
    cells = cells._replace(level=cells.level.astype(jnp.float64))
    states = toys.widen(sweep.init(KEY, INVERSION, cells))
    return sweep.fit(
        KEY, INVERSION, DRAW, data, cells, toys.victim(1, dtype=jnp.float64),
        states=states, num_steps=4, how=how, over_time=over_time, chunk=2, **settings,
    )[:2]  # fmt: skip


@pytest.mark.parametrize("how, over_time", [("vmap", "host"), ("vmap", "scan"), ("map", "host")])
def test_a_sweep_over_eight_devices_is_that_of_one_and_they_exchange_nothing(how, over_time, use, wide):
    expected = fit(wide)
    seen = []
    use(8)
    states, infos = fit(wide, how, over_time, on_chunk=lambda done, *now: seen.append((done, now)))
    toys.assert_close((states, infos), expected, 1e-9)
    assert [done for done, _ in seen] == [2, 4]
    toys.assert_close(seen[1][1][0], states, 0)
    toys.assert_close(seen[1][1][1], jax.tree.map(lambda leaf: leaf[2:], infos), 0)
    assert all(len(leaf.sharding.device_set) == 1 for leaf in jax.tree.leaves(states))
    advance = sweep._advance(INVERSION.step, DRAW, how, False, devices.mesh() if how == "map" else None)
    step, scanned = loop._programs(advance, 2)
    assert collectives(scanned if over_time == "scan" else step) == [set()]


class Small(nn.Module):
    """A net with batch moments, in float64."""

    @nn.compact
    def __call__(self, x, *, train: bool):
        wide = dict(dtype=jnp.float64, param_dtype=jnp.float64)
        x = nn.Conv(4, (3, 3), 2, **wide)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, **wide)(x))
        return nn.Dense(toys.CLASSES, **wide)(x.reshape(x.shape[0], -1))


SMALL = build.from_flax(Small(), toys.SHAPE)
TRAINER = supervised.make(SMALL, supervised.Config(num_steps=6))


def small_variables(key):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float64), SMALL.init(key))


def train(data, batch_size=16, **settings):
    """A trained state and its infos."""
    state = TRAINER.init(small_variables(jax.random.key(0)))
    return loop.fit(KEY, TRAINER.step, draw.uniform(batch_size), data, state, num_steps=6, **settings)[:2]


@pytest.mark.parametrize("over_time", ["host", "scan"])
def test_a_batch_is_divided_among_the_devices_and_training_is_that_of_one(over_time, use, wide):
    expected = train(wide)
    use(8)
    found = train(wide, over_time=over_time, chunk=3)
    toys.assert_close(found, expected, 1e-9)
    step, scanned = loop._programs(loop._trained(TRAINER.step, draw.uniform(16)), 3)
    program = scanned if over_time == "scan" else step
    assert [kinds and kinds <= {"all-reduce"} for kinds in collectives(program)] == [True], "one trace, sums alone"
    (text,) = [form.as_text() for form in program._compiled.values() if spread_over(form) > 1]
    assert "f64[2,8,8,1]" in text and "f64[16,8,8,1]" not in text, "each device has two images of sixteen"


def test_a_batch_that_the_devices_cannot_share_evenly_stays_whole(use, wide):
    expected = train(wide, 10)
    use(8)
    toys.assert_close(train(wide, 10), expected, 0)


def test_erasing_without_data_is_divided_too(use):
    """What the generators make is divided with their noise; in float32, so only the first iterations are compared."""
    config = dhbe.Config(
        batch_size=8, width=2, noise_dim=4, trigger_size=3, inner_steps=1, num_steps=2, learning_rate=0.01
    )
    spec = build.Spec(arch="cnn", classes=4, image_shape=(8, 8, 1), options={"width": 3, "stages": 1})
    variables = build.net(spec).init(jax.random.key(0))
    run = lambda: erase.run(KEY, build.net(spec), spec.image_shape, variables, config)
    expected = run()
    use(8)
    found = run()
    toys.assert_close(found.variables, expected.variables, 1e-4)
    prepared = erase._prepared(build.net(spec), spec.image_shape, erase.settled(config))
    assert ["all-reduce" in kinds for kinds in collectives(loop._programs(prepared[1], 10)[0])] == [True]


STUDENTS = Inversion(
    lambda key: TRAINER.init(small_variables(key)),
    lambda key, state, batch, cell, victim: TRAINER.step(key, state, batch),
    None,
    None,
)
"""Training of many nets as a sweep: each cell has a net of its own."""


def fit_students(data, how, states=None):
    cells = sweep.grid(range(5))
    return sweep.fit(KEY, STUDENTS, draw.uniform(8), data, cells, (), num_steps=3, how=how, states=states)[:2]


@pytest.mark.parametrize("how", ["map", "vmap"])
def test_students_on_eight_devices(how, use, wide):
    expected = fit_students(wide, "vmap")
    use(8)
    toys.assert_close(fit_students(wide, how), expected, 1e-9)
    advance = sweep._advance(STUDENTS.step, draw.uniform(8), how, False, devices.mesh() if how == "map" else None)
    assert collectives(loop._programs(advance, 20)[0]) == [set()] or how == "vmap"


def test_students_and_their_batches_on_a_mesh_of_both(use, wide):
    """Placed by the caller: four pairs of devices, each with a student or more and half of its batch apiece."""
    cells = sweep.grid(range(4))
    expected = sweep.fit(KEY, STUDENTS, draw.uniform(8), wide, cells, (), num_steps=3)[:2]
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), devices.AXES)
    states = jax.device_put(sweep.init(KEY, STUDENTS, cells), NamedSharding(mesh, PartitionSpec("cell")))
    found = sweep.fit(KEY, STUDENTS, draw.uniform(8), wide, cells, (), num_steps=3, states=states)[:2]
    assert len(found[0].step.sharding.device_set) == 8
    toys.assert_close(jax.device_get(found), jax.device_get(expected), 1e-9)


# slots


def search(inversion, data, cells, **settings):
    with jax.enable_x64(True):
        weights = jnp.asarray(0.3 * np.random.default_rng(0).normal(size=(64, 4)))
        victim = {"params": {"w": weights}}
        return sweep.search(KEY, inversion, draw.uniform(8), data, cells, victim, num_steps=23, **settings)


@pytest.mark.parametrize("width, over_time", [(3, "host"), (None, "scan")])
def test_slots_shared_by_eight_devices_end_as_on_one(width, over_time, use, wide):
    cells = toys.widen(sweep.grid(range(4), source=range(4)))
    settings = dict(slots=width, over_time=over_time, chunk=5)
    expected = search(BY_SIZE, wide, cells, **settings)
    assert len(set(expected.steps.tolist())) > 4
    program = slots._programs(BY_SIZE, draw.uniform(8), over_time)[1]
    use(8)
    found = search(BY_SIZE, wide, cells, **settings)
    assert found.slots == (8 if width else 16) and found.image_steps == expected.image_steps
    np.testing.assert_array_equal(found.steps, expected.steps)
    np.testing.assert_array_equal(found.states.mark, expected.states.mark)
    toys.assert_close((found.states, found.infos), (expected.states, expected.infos), 1e-9)
    assert not set().union(*collectives(program)) and collectives(program)


def test_slots_on_devices_narrow_and_shrink_to_one_each(use, wide, monkeypatch):
    cells = sweep.grid(range(4), source=range(4))
    use(4)
    widths = []
    found = sweep.search(
        KEY, BY_SIZE, draw.uniform(8), jax.tree.map(lambda leaf: leaf, wide), toys.widen(cells),
        {"params": {"w": jnp.asarray(0.3 * np.random.default_rng(0).normal(size=(64, 4)))}},
        num_steps=23, slots=12, chunk=2, on_chunk=lambda at: widths.append(at.slots),
    )  # fmt: skip
    assert widths[0] == 12 == found.slots and set(widths) == {12, 8, 4}


# rates


def test_rates_are_those_of_one_device(use):
    rng = np.random.default_rng(1)
    victim = {"params": {"w": jnp.asarray(rng.normal(size=(64, 4)), jnp.float32)}}
    cells, held_out = sweep.grid(range(4), source=range(4)), toys.quadrants(1, 21)
    states = sweep.init(KEY, NUDGING, cells)
    judge = lambda: sweep.attack_success(KEY, LINEAR, NUDGING, states, cells, victim, held_out, batch_size=8)
    expected = judge()
    assert expected.shape == (12,) and np.ptp(expected) > 0.1
    use(8)
    np.testing.assert_array_equal(judge(), expected)


# what can go wrong


@pytest.mark.parametrize("asked", ["0", "9", "-1", "two", ""])
def test_a_number_of_devices_that_there_is_not(asked, use):
    use(asked)
    with pytest.raises(UserError, match=r"this machine has 8, give 1\.\.8"):
        devices.mesh()


def test_a_cell_that_diverges_is_named_and_the_ones_that_fill_up_are_not(use):
    def step(key, state, batch, cell, victim):
        state, info = NUDGING.step(key, state, batch, cell, victim)
        return state, info._replace(loss=jnp.where(cell.target == 0, jnp.nan, info.loss))

    use(8)
    victim = {"params": {"w": jnp.zeros((64, 4))}}
    with pytest.raises(FloatingPointError, match=r"^class 0 at level 0\.9: values"):
        sweep.fit(
            KEY, NUDGING._replace(step=step), DRAW, jax.tree.map(jnp.asarray, toys.quadrants(0, 24)),
            sweep.grid(range(3)), victim, num_steps=2,
        )  # fmt: skip


def test_results_can_be_used_with_arrays_on_one_device(use, wide):
    use(8)
    states, _ = fit(wide)
    alone = jax.device_put(jnp.ones(()), jax.devices()[0])
    jax.block_until_ready(jax.tree.map(lambda leaf: leaf + alone.astype(leaf.dtype), states))


# traces


SCAN = workflow.ScanConfig(
    method="mesa", steps=3, locate_steps=3, batch_size=6, levels=(0.5, 0.9), mesa=mesa.Config(hidden=8, place="image")
)


@pytest.mark.parametrize("method, traces", [("mesa", 2), ("pixel", 2), ("neural-cleanse", 2), ("auto", 5)])
@pytest.mark.parametrize("count", [1, 8])
def test_a_scan_traces_each_stage_once_and_a_second_victim_not_at_all(method, traces, count, use):
    """Searching and judging are a trace each, for all cells at once; "auto" searches twice and judges two places."""
    use(count)
    counted, config = toys.Counted(), dataclasses.replace(SCAN, method=method)
    held_out = toys.quadrants(1, 21)
    for number, victim in enumerate((toys.victim(1), toys.victim(2, place=(0, 3)))):
        found = workflow.scan(
            jax.random.key(number), counted.net, victim, toys.SHAPE, 4, toys.quadrants(number, 24), held_out, config
        )
        assert counted.traces <= traces and (number == 0 or found.seconds.compile == 0)
        traces = counted.traces
