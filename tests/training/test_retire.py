"""Searches that end once their outcome is decided: the rule, the verdict, the cost, and the memory
they may take."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import toys

from jaxbd.base import Suspect, UserError
from jaxbd.data import draw
from jaxbd.inversion import mesa, stopping
from jaxbd.pipelines import evidence
from jaxbd.pipelines import scan as scanning
from jaxbd.training import slot_programs, slots, sweep, table
from jaxbd.training.memory import Bytes
from jaxbd.training.run import Run

AFTER = stopping.stop_after(2e-3)
SMALL = mesa.Config(hidden=32, noise_dim=8, learning_rate=2e-3)
RULE = mesa.make(toys.NET, toys.SHAPE, dataclasses.replace(SMALL, stop_after=AFTER)).converged
KEY, DRAW = jax.random.key(0), draw.uniform(16)
CELLS = sweep.grid(range(toys.CLASSES), level=(0.5, 0.8))
DATA, HELD_OUT = toys.quadrants(0, 80), toys.quadrants(1, 80)
SCAN = scanning.ScanConfig(method="mesa", steps=150, batch_size=16, levels=(0.5, 0.8), mesa=SMALL)
VICTIMS = {"attacked": toys.victim(2), "clean": toys.victim(2, gain=0.0)}


def first_settled(confidence, entropy, level=0.8) -> int | None:
    """Steps after which a search with this course [steps] is settled; None for never."""
    margin, spread = jnp.zeros(2), jnp.zeros(2)
    empty = mesa.State(*[None] * len(mesa.State._fields))
    for step, (now, nats) in enumerate(zip(confidence, entropy, strict=True)):
        margin = stopping.update_means(margin, jnp.float32(now - level), jnp.int32(step))
        spread = stopping.update_means(spread, jnp.float32(nats), jnp.int32(step))
        if RULE(empty._replace(step=jnp.int32(step + 1), margin=margin, spread=spread)):
            return step + 1
    return None


COUNT = np.arange(80)
LOW, HIGH, LEVEL_ENTROPY = np.full(80, 0.02), np.full(80, 0.85), np.full(80, 1.0)


@pytest.mark.parametrize(
    "confidence, entropy, expected",
    [
        (HIGH, LEVEL_ENTROPY, AFTER),
        (LOW, LEVEL_ENTROPY, AFTER),
        (HIGH, 0.1 * COUNT, None),  # its triggers still grow more diverse
        (np.full(80, 0.6), LEVEL_ENTROPY, None),  # neither at its level nor far below
        (np.minimum(0.01 * COUNT, 0.79), LEVEL_ENTROPY, None),  # on its way up
    ],
)
def test_a_search_is_settled_at_its_level_with_still_entropy_or_far_below_without_rising(
    confidence, entropy, expected
):
    assert first_settled(confidence, entropy) == expected


def test_what_rises_late_is_waited_for():
    """Low until shortly before the rule applies, then rising: not hopeless; settled when it has got
    there."""
    steps = np.arange(160)
    late = np.where(steps < AFTER - 6, 0.02, np.minimum(0.02 + 0.05 * (steps - AFTER + 6), 0.82))
    assert AFTER + 10 < first_settled(late, np.ones(160)) < 160
    assert first_settled(np.where(steps < AFTER - 6, 0.02, 0.022), np.ones(160)) == AFTER


def test_the_rule_is_off_unless_asked_for():
    for config in (
        mesa.Config(),
        mesa.paper(),
        scanning.PRESETS["released"].modelled(),
        scanning.PRESETS["paper"].modelled(),
    ):
        assert config.stop_after == 0 and mesa.make(toys.NET, toys.SHAPE, config).converged is None
    assert not scanning.ScanConfig().retire and scanning.PRESETS["quick"].retire
    assert scanning.PRESETS["quick"].modelled().stop_after == stopping.stop_after(1e-3) == 40
    assert (
        dataclasses.replace(SCAN, retire=True, mesa=mesa.Config(stop_after=7)).modelled().stop_after
        == 7
    )
    with pytest.raises(UserError, match="stop_after is -1"):
        mesa.Config(stop_after=-1)


@pytest.fixture(scope="module")
def full():
    """Float64: an inversion that never settles, (data, cells, victim), states and infos of 23 steps
    of the plain form."""
    with jax.enable_x64(True):
        inversion = mesa.make(toys.NET, toys.SHAPE, dataclasses.replace(SMALL, stop_after=1000))
        start = inversion.init
        inversion = inversion._replace(init=lambda key: toys.widen(start(key)))
        images = toys.quadrants(0, 80, np.float64)
        data = jax.tree.map(lambda leaf: jnp.asarray(leaf[images.labels == 0]), images)
        inputs = data, toys.widen(CELLS), toys.victim(2, dtype=jnp.float64)
        return inversion, inputs, *reference.fit(KEY, inversion, DRAW, *inputs, num_steps=23)


def searched(full, over_time="auto", **settings):
    inversion, inputs, *_ = full
    settings = {"num_steps": 23, "course": True, **settings}
    with jax.enable_x64(True):
        return sweep.search(
            Run(over_time=over_time), "search", KEY, inversion, DRAW, *inputs, **settings
        )


def test_the_means_are_those_of_the_batches(full):
    """All images are of class 0: searches for it have none to go by, and count as if nothing
    worked."""
    *_, states, infos = full
    margins = np.where(np.asarray(CELLS.target) == 0, 0, infos.confidence) - np.asarray(
        CELLS.level, float
    )
    for values, kept in ((margins, states.margin), (infos.entropy, states.spread)):
        for number, rate in enumerate(stopping.RATES):
            mean = np.zeros(len(values[0]))
            for step, value in enumerate(values):
                mean += max(rate, 1 / (step + 1)) * (value - mean)
            np.testing.assert_allclose(kept[:, number], mean, atol=1e-6)


@pytest.mark.parametrize("settings", [dict(slots=3), dict(over_time="scan"), dict(chunk=4)])
def test_where_nothing_settles_it_is_the_full_run(full, settings):
    *_, states, infos = full
    found = searched(full, **settings)
    toys.assert_close(found.states, states, 1e-9)
    toys.assert_close(found.course, infos, 1e-9)


def test_fields_of_the_fresh_states_can_be_given(full):
    """They reach the cell whose number they have, through slots that others used before."""
    places = np.arange(16).reshape(8, 2)
    found = searched(full, num_steps=2, slots=3, given={"place": places})
    np.testing.assert_array_equal(found.states.place, places)
    assert found.states.place.dtype == np.int32


@pytest.fixture(scope="module")
def scans():
    """(victim, retire) -> scan; all by one net, whose traces are counted."""
    counted = toys.Counted()
    return counted, {
        (name, retire): scanning.scan(
            Run(),
            jax.random.key(5),
            Suspect(counted.net, victim, toys.SHAPE, 4),
            DATA,
            HELD_OUT,
            dataclasses.replace(SCAN, retire=retire),
        )
        for retire in (False, True)
        for name, victim in VICTIMS.items()
    }


def test_the_verdict_is_that_of_the_full_run_for_less_than_half_of_the_images(scans):
    _, found = scans
    for name, verdict in (("attacked", "backdoored"), ("clean", "clean")):
        whole, short = (found[name, retire] for retire in (False, True))
        assert short.decision.verdict == whole.decision.verdict == verdict
        assert short.decision.targets == whole.decision.targets
        assert whole.image_steps == 8 * 150 * 16 > 2 * short.image_steps


def test_retired_cells_leave_a_course_up_to_their_end_and_as_good_triggers(scans):
    _, found = scans
    whole, short = (found["attacked", retire] for retire in (False, True))
    made = np.isfinite(short.infos.confidence).sum(0)
    assert made.min() >= AFTER and made.max() <= 150 and np.isfinite(whole.infos.confidence).all()
    for cell, count in enumerate(made):
        assert (
            np.isnan(short.infos.entropy[count:, cell]).all()
            and np.isfinite(short.infos.entropy[:count, cell]).all()
        )
        np.testing.assert_allclose(
            short.infos.confidence[:5, cell], whole.infos.confidence[:5, cell], atol=1e-3
        )
    assert short.rates[2] > 0.85 and evidence.has_reached(short, 2).any()
    weights = np.asarray(evidence.mix_by_entropy(short, 2).trigger_params.weights)
    assert np.isfinite(weights).all() and weights.sum() == pytest.approx(1)


def test_one_trace_serves_the_grid_every_width_and_a_second_victim(scans):
    """Two settings make two inversions: each is traced once, for all cells, batch widths and
    victims; judging too, and so is the net without a trigger."""
    counted, found = scans
    assert counted.traces == 5
    assert found["clean", True].seconds.compile < found["attacked", True].seconds.compile
    inversion = found["attacked", True].inversion
    programs = slot_programs.programs(inversion, draw.uniform(16), "host")
    assert programs.advance.traces <= math.log2(8) + 1


# memory


def test_a_budget_halves_the_cells_that_run_at_a_time(monkeypatch, scans):
    counted, found = scans
    widths, real = [], sweep.search

    def watched(*args, **settings):
        made = real(*args, **settings)
        widths.append(made.slots)
        return made

    victim = VICTIMS["attacked"]
    inputs = jax.random.key(5), Suspect(counted.net, victim, toys.SHAPE, 4), DATA, HELD_OUT
    inversion = found["attacked", False].inversion
    settings = dict(num_steps=150, over_time="host", chunk=scanning.CHUNK, course=True)
    task = slots.make_task(KEY, inversion, draw.uniform(16), DATA, CELLS, victim, **settings)
    needed = table.bytes_needed(task, table.open_table(task, 4, np.arange(8)))
    monkeypatch.setattr(sweep, "search", watched)
    short = dataclasses.replace(SCAN, steps=3, memory_budget=needed)
    held = scanning.scan(Run(), *inputs, short)
    free = scanning.scan(Run(), *inputs, dataclasses.replace(short, memory_budget=None))
    assert widths == [4, 8]
    np.testing.assert_allclose(held.infos.confidence, free.infos.confidence, atol=1e-3)
    with pytest.raises(UserError, match="the memory budget is 1,000"):
        scanning.scan(Run(), *inputs, dataclasses.replace(short, memory_budget=1000))
    with pytest.raises(UserError, match="at least 1"):
        dataclasses.replace(short, memory_budget=0)


@pytest.mark.parametrize(
    "text, size",
    [
        ("4096", 4096),
        ("2GiB", 2**31),
        ("500MB", 500_000_000),
        ("1.5 kib", 1536),
        ("2e9", 2 * 10**9),
        ("3g", 3 * 10**9),
    ],
)
def test_sizes_with_units(text, size):
    assert Bytes.parse(text) == size


@pytest.mark.parametrize("text", ["", "0", "0.5", "much", "-5", "5 apples", "GiB", "1e", "2e999"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UserError, match="is not a size; give bytes"):
        Bytes.parse(text)
