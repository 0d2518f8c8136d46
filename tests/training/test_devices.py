"""Many devices give what one gives, without a word between them during a sweep; a grid and a second
victim are traced once. On eight forced CPU devices."""

import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import toys
from test_sweep_slots import BY_SIZE, KEY, LINEAR, NUDGING

from jaxbd import devices, methods
from jaxbd.base import RepairData, Suspect, UserError
from jaxbd.data import draw
from jaxbd.inversion import mesa
from jaxbd.metrics import sweep_rates
from jaxbd.models import build
from jaxbd.pipelines import repair as repairing
from jaxbd.pipelines import scan as scanning
from jaxbd.repairs import dhbe
from jaxbd.training import loop, slot_programs, supervised, sweep
from jaxbd.training.program import Program
from jaxbd.training.run import Run

COLLECTIVE = re.compile(r"\b(all-reduce|all-gather|collective-permute|all-to-all|reduce-scatter)\b")
DRAW = draw.uniform(6)
GRID = dict(target=range(4), level=(0.5, 0.8, 0.9))
"""Twelve cells: sixteen places on eight devices."""
CONFIG = mesa.Config(hidden=8, noise_dim=8, place="searched")
INVERSION = mesa.make(toys.NET, toys.SHAPE, CONFIG)
WIDE = INVERSION._replace(init=lambda key: toys.widen(INVERSION.init(key)))


@pytest.fixture
def use(monkeypatch):
    """use(count): the devices in use from here on."""
    assert jax.device_count() >= 8
    return lambda count: monkeypatch.setenv(devices.LIMIT, str(count))


@pytest.fixture
def wide():
    with jax.enable_x64(True):
        yield jax.tree.map(jnp.asarray, toys.quadrants(0, 24, np.float64))


def collectives(program: Program) -> list[set[str]]:
    """What the devices exchange in each compiled form of `program` that runs on several."""
    forms = [form for form in program._compiled.values() if spread_over(form) > 1]
    return [set(COLLECTIVE.findall(form.as_text())) for form in forms]


def spread_over(compiled) -> int:
    return max(len(sharding.device_set) for sharding in jax.tree.leaves(compiled.output_shardings))


def fit(data, over_time="host", **settings):
    """States and infos of a small float64 grid of MESA."""
    cells, victim = toys.widen(sweep.grid(**GRID)), toys.victim(1, dtype=jnp.float64)
    settings = dict(num_steps=4, slots=12, chunk=2, course=True)
    run, task = Run(over_time=over_time), (WIDE, DRAW, data, cells, victim)
    found = sweep.search(run, "grid", KEY, *task, **settings)
    return found.states, found.course


@pytest.mark.parametrize("over_time", ["host", "scan"])
def test_a_sweep_over_eight_devices_is_that_of_one_and_they_exchange_nothing(over_time, use, wide):
    expected = fit(wide)
    use(8)
    toys.assert_close(fit(wide, over_time), expected, 1e-9)
    programs = slot_programs.programs(WIDE, DRAW, over_time)
    assert collectives(programs.advance) == [set()] == collectives(programs.refill)


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


def train(data, batch_size=16, over_time="auto", chunk=20):
    """A trained state and its infos."""
    state, drawn = TRAINER.init(small_variables(jax.random.key(0))), draw.uniform(batch_size)
    return Run(over_time=over_time).fit(
        "training",
        KEY,
        TRAINER.step,
        drawn,
        data,
        state,
        info=supervised.Info,
        num_steps=6,
        chunk=chunk,
    )[:2]


@pytest.mark.parametrize("over_time", ["host", "scan"])
def test_a_batch_is_divided_among_the_devices_and_training_is_that_of_one(over_time, use, wide):
    expected = train(wide)
    use(8)
    found = train(wide, over_time=over_time, chunk=3)
    toys.assert_close(found, expected, 1e-9)
    step, scanned = loop._programs(loop.with_batches(TRAINER.step, draw.uniform(16)), 3)
    program = scanned if over_time == "scan" else step
    assert [kinds and kinds <= {"all-reduce"} for kinds in collectives(program)] == [True], (
        "one trace, sums alone"
    )
    (text,) = [form.as_text() for form in program._compiled.values() if spread_over(form) > 1]
    assert "f64[2,8,8,1]" in text and "f64[16,8,8,1]" not in text, (
        "each device has two images of sixteen"
    )


def test_a_batch_that_the_devices_cannot_share_evenly_stays_whole(use, wide):
    expected = train(wide, 10)
    use(8)
    toys.assert_close(train(wide, 10), expected, 0)


def test_erasing_without_data_is_divided_too(use):
    """What the generators make is divided with their noise; in float32, so only the first
    iterations are compared."""
    config = dhbe.Config(
        batch_size=8,
        width=2,
        noise_dim=4,
        trigger_size=3,
        inner_steps=1,
        num_steps=2,
        learning_rate=0.01,
    )
    spec = build.Spec(
        arch="cnn", classes=4, image_shape=(8, 8, 1), options={"width": 3, "stages": 1}
    )
    net = build.net(spec)
    suspect = Suspect(net, net.init(jax.random.key(0)), spec.image_shape, spec.classes)
    run = lambda: repairing.repair(Run(), KEY, suspect, None, (), "dhbe", config)
    expected = run()
    use(8)
    found = run()
    toys.assert_close(found.variables, expected.variables, 1e-4)
    method = methods.find("repair", "dhbe")
    settings = repairing.adapt(method, config, suspect, RepairData(), 64)
    (phase,) = repairing.make(method, suspect.problem(), settings).phases
    program, _ = loop._programs(loop.with_batches(phase.step, None), phase.chunk)
    assert ["all-reduce" in kinds for kinds in collectives(program)] == [True]


# slots


def search(inversion, data, cells, over_time="auto", **settings):
    weights = jnp.asarray(0.3 * np.random.default_rng(0).normal(size=(64, 4)))
    task = inversion, draw.uniform(8), data, cells, {"params": {"w": weights}}
    return sweep.search(Run(over_time=over_time), "cells", KEY, *task, num_steps=23, **settings)


@pytest.mark.parametrize("width, over_time", [(3, "host"), (None, "scan")])
def test_slots_shared_by_eight_devices_end_as_on_one(width, over_time, use, wide):
    cells = toys.widen(sweep.grid(range(4), source=range(4)))
    settings = dict(slots=width, over_time=over_time, chunk=5)
    expected = search(BY_SIZE, wide, cells, **settings)
    assert len(set(expected.steps.tolist())) > 4
    program = slot_programs.programs(BY_SIZE, draw.uniform(8), over_time).advance
    use(8)
    found = search(BY_SIZE, wide, cells, **settings)
    assert found.slots == (8 if width else 16) and found.image_steps == expected.image_steps
    np.testing.assert_array_equal(found.steps, expected.steps)
    np.testing.assert_array_equal(found.states.mark, expected.states.mark)
    toys.assert_close((found.states, found.infos), (expected.states, expected.infos), 1e-9)
    assert not set().union(*collectives(program)) and collectives(program)


def test_slots_are_equally_many_on_each_device_and_stay_as_many(use, wide):
    cells, widths = toys.widen(sweep.grid(range(4), source=range(4))), set()
    use(4)
    watch = lambda at: widths.add(at.slots)
    found = search(BY_SIZE, wide, cells, slots=9, chunk=2, on_chunk=watch)
    assert widths == {8} and found.slots == 8


# rates


def test_rates_are_those_of_one_device(use):
    rng = np.random.default_rng(1)
    victim = {"params": {"w": jnp.asarray(rng.normal(size=(64, 4)), jnp.float32)}}
    cells, held_out = sweep.grid(range(4), source=range(4)), toys.quadrants(1, 21)
    states = reference.init(KEY, NUDGING, cells)
    judge = lambda: sweep_rates.attack_success(
        KEY, LINEAR, NUDGING, states, cells, victim, held_out, batch_size=8
    )
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
        task = (
            NUDGING._replace(step=step),
            DRAW,
            toys.quadrants(0, 24),
            sweep.grid(range(3)),
            victim,
        )
        sweep.search(Run(), "cells", KEY, *task, num_steps=2)


def test_results_can_be_used_with_arrays_on_one_device(use, wide):
    use(8)
    states, _ = fit(wide)
    alone = jax.device_put(jnp.ones(()), jax.devices()[0])
    jax.block_until_ready(jax.tree.map(lambda leaf: leaf + alone.astype(leaf.dtype), states))


# traces


SCAN = scanning.ScanConfig(
    method="mesa",
    steps=3,
    locate_steps=3,
    batch_size=6,
    levels=(0.5, 0.9),
    mesa=mesa.Config(hidden=8, place="image"),
)


@pytest.mark.parametrize(
    "method, traces", [("mesa", 3), ("pixel", 3), ("neural-cleanse", 3), ("auto", 10)]
)
@pytest.mark.parametrize("count", [1, 8])
def test_a_scan_traces_each_stage_once_and_a_second_victim_not_at_all(method, traces, count, use):
    """Searching and judging are a trace each, for all cells at once, and so is the net without a
    trigger; "auto" searches three times and judges masks and two places."""
    use(count)
    counted, config = toys.Counted(), dataclasses.replace(SCAN, method=method)
    held_out = toys.quadrants(1, 21)
    for number, victim in enumerate((toys.victim(1), toys.victim(2, place=(0, 3)))):
        suspect = Suspect(counted.net, victim, toys.SHAPE, 4)
        data, key = toys.quadrants(number, 24), jax.random.key(number)
        found = scanning.scan(Run(), key, suspect, data, held_out, config)
        assert counted.traces <= traces
        if method != "auto":  # another victim may be judged another way there
            assert number == 0 or found.seconds.compile == 0
            traces = counted.traces
