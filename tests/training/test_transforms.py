"""vmap, map, host loop, scan, slots and lanes are one computation; a grid costs one trace.

In float64: in float32 one Adam step turns the rounding of a tiny gradient into a whole learning
rate.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import toys

from jaxbd.data import draw
from jaxbd.inversion import mesa
from jaxbd.metrics import sweep_rates
from jaxbd.training import lanes, sweep
from jaxbd.training.program import default_time
from jaxbd.training.run import Run

CONFIG = mesa.Config(hidden=8, noise_dim=8, place="searched")
DRAW = draw.uniform(6)
CELLS = dict(target=(1, 3), level=(0.5, 0.9))
STEPS, KEY = 4, jax.random.key(7)


class Counted(toys.Counted):
    """With an inversion of the net whose traces are counted."""

    def __init__(self):
        super().__init__()
        self.inversion = mesa.make(self.net, toys.SHAPE, CONFIG)


def inputs():
    """(inversion, draw, data, cells, victim) in float64."""
    made = Counted().inversion
    wide = made._replace(init=lambda key: toys.widen(made.init(key)))
    data = jax.tree.map(jnp.asarray, toys.quadrants(0, 24, np.float64))
    return wide, DRAW, data, toys.widen(sweep.grid(**CELLS)), toys.victim(1, dtype=jnp.float64)


@pytest.fixture(scope="module")
def expected():
    """The inputs, and the reference: vmap over cells, a host loop over time, on one device."""
    with jax.enable_x64(True):
        task = inputs()
        states, infos = reference.fit(KEY, *task, num_steps=STEPS, over_time="host")
        assert all(leaf.dtype != jnp.float32 for leaf in jax.tree.leaves(states))
    assert np.ptp(infos.confidence, axis=1).max() > 1e-6, "cells differ from one another"
    return task, states, infos


@pytest.mark.parametrize("how, over_time", [("map", "host"), ("loop", "host"), ("vmap", "scan")])
def test_the_plain_forms_are_the_same_computation(expected, how, over_time):
    task, *wanted = expected
    with jax.enable_x64(True):
        settings = dict(num_steps=STEPS, chunk=2, how=how, over_time=over_time)
        toys.assert_close(list(reference.fit(KEY, *task, **settings)), wanted, 1e-9)


@pytest.mark.parametrize(
    "slots, over_time, in_lanes",
    [(4, "host", True), (4, "host", False), (4, "scan", False), (3, "host", True)],
)
def test_a_search_of_all_cells_is_the_plain_form(expected, slots, over_time, in_lanes, monkeypatch):
    monkeypatch.setattr(lanes, "are_default", lambda: in_lanes)
    task, states, infos = expected
    with jax.enable_x64(True):
        found = sweep.search(
            Run(over_time=over_time),
            "cells",
            KEY,
            *task,
            num_steps=STEPS,
            slots=slots,
            chunk=2,
            course=True,
        )
    toys.assert_close((found.states, found.course), (states, infos), 1e-9)


def test_a_grid_costs_one_trace_and_another_victim_none():
    """Searching and judging are a trace each."""
    counted, data = Counted(), jax.tree.map(jnp.asarray, toys.quadrants(0, 24))
    cells, held_out = sweep.grid(**CELLS), toys.quadrants(1, 21)
    task = counted.inversion, DRAW, data, cells
    for number, victim in enumerate((toys.victim(1), toys.victim(2, place=(0, 3)))):
        found = sweep.search(Run(), "cells", jax.random.key(number), *task, victim, num_steps=3)
        assert counted.traces == 1 + number and (found.seconds.compile > 0) == (number == 0)
        judged = counted.net, counted.inversion, found.states, cells, victim, held_out
        rates = sweep_rates.attack_success(KEY, *judged, batch_size=8)
        assert rates.shape == (4,) and counted.traces == 2


def test_the_default_over_time_follows_the_backend():
    assert default_time() == ("host" if jax.default_backend() == "cpu" else "scan")
